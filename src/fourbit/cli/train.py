"""`fourbit train`: fine-tune as a config file, or a few options, say."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from fourbit.cli.common import add_config_arguments, console, print_json, read_settings
from fourbit.cli.main import INTERRUPTED
from fourbit.cli.plan import add_memory_argument
from fourbit.memory.sizes import parse_size, size_text


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a model",
        description="Fine-tune a model in 4 bits with a LoRA adapter, into a run folder.",
        epilog="example: fourbit train --model models/SmolLM2-135M --data tickets.jsonl "
        "--output runs/tickets --set train.epochs=2",
    )
    add_config_arguments(parser)
    add_memory_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="load and check everything, train nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, or with --dry-run say what would be trained."""
    config = read_settings(args)
    from fourbit.processes import join  # torch and transformers, only once the settings are right
    from fourbit.training import run as training

    leads = join().leads
    out = console(args.json) if leads else Console(quiet=True)
    budget = parse_size(args.memory) if args.memory else None
    if args.dry_run:
        plan = training.dry_run(config, out, budget)
        if args.json and leads:
            print_json(plan)
        return 0
    result = training.run(
        config, out, resume=args.resume, overwrite=args.overwrite, memory=budget, predict=True
    )
    if not leads:
        return INTERRUPTED if result.stopped == "interrupted" else 0
    if args.json:
        print_json({**result.metrics, "folder": str(result.folder), "adapter": str(result.adapter)})
    else:
        out.print(
            _closing(result.metrics, result.stopped, str(result.folder)), highlight=False, soft_wrap=True
        )
    return INTERRUPTED if result.stopped == "interrupted" else 0


def _closing(metrics: dict[str, Any], stopped: str, folder: str) -> str:
    how = {
        "done": "finished",
        "early": "stopped early, the held-out loss no longer falls,",
        "interrupted": "interrupted, everything is saved,",
    }[stopped]
    lines = [
        f"{how} after {metrics['steps']} steps, {metrics['tokens']:,} tokens in {metrics['seconds']:.0f} s "
        f"({metrics['tokens_per_second']:,.0f} tokens/s{_time(metrics)}), {_peak(metrics)}"
    ]
    if metrics["heldout_loss"] is not None:
        lines.append(f"best held-out loss {metrics['heldout_loss']:.4f} at step {metrics['best_step']}")
    if stopped == "interrupted":
        lines.append(f"go on: fourbit train {folder}/config.yaml --resume")
    else:
        lines += [f"adapter: {folder}/adapter", f"talk to it: fourbit chat {folder}"]
    return "\n".join(lines)


def _time(metrics: dict[str, Any]) -> str:
    predicted = metrics.get("predicted_seconds")
    return "" if predicted is None else f", {predicted:.0f} s predicted"


def _peak(metrics: dict[str, Any]) -> str:
    measured, predicted = metrics["peak_bytes"], metrics.get("predicted_peak_bytes")
    text = f"peak memory {measured / 1e9:.2f} GB"
    if predicted is None:
        return text
    error = 100 * (predicted - measured) / measured
    return f"{text} ({size_text(predicted)} predicted, {error:+.0f} %)"
