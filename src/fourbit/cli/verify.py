"""`fourbit verify`: a merge or export beside the adapter it came from, read back by its own software."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from fourbit.cli.common import console, print_json, stage_progress
from fourbit.cli.subject import read_subject_settings
from fourbit.errors import ConfigError

if TYPE_CHECKING:
    from fourbit.exporting.verification import Bounds, Checked, Verification


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a merge or export with the adapter it came from",
        description="Read artifacts back with the software that will serve them (transformers, PEFT, "
        "bitsandbytes, compressed-tensors, llama.cpp) and compare them on held-out rows with the adapter on "
        "its training base: loss, exact answers, likeliest tokens, token ids. "
        "The figures are saved beside each one. Exit code 7 if one lost more than allowed.",
        epilog="example: fourbit verify runs/demo exports/demo exports/demo.Q8_0.gguf",
    )
    parser.add_argument("run_folder", metavar="RUN", help="run folder of `fourbit train`, or its config file")
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="folder or .gguf file to check")
    parser.add_argument("--adapter", help="PEFT adapter folder (default: the run's)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one setting, such as model.device=cpu",
    )
    parser.add_argument("--gguf-base", metavar="FILE", help="the base as .gguf, for a LoRA .gguf")
    add_verify_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, progress on standard error")
    parser.set_defaults(run=run, model=None)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --rows, --threshold, --agreement, --accept-loss: what merge and export share."""
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE",
        help="rows to compare on (default: those the run held out); may be repeated",
    )
    parser.add_argument("--rows", type=int, default=200, metavar="N", help="so many of them (default 200)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=1.0,
        metavar="PERCENT",
        help="most that the loss may rise (default 1)",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=97.0,
        metavar="PERCENT",
        help="least share of answer tokens whose likeliest token stays the same (default 97)",
    )
    parser.add_argument("--accept-loss", action="store_true", help="report a larger loss, but do not fail")


def bounds(args: argparse.Namespace) -> Bounds:
    """The bounds that the arguments of `add_verify_arguments` describe."""
    from fourbit.exporting.verification import Bounds

    if not args.threshold >= 0:
        raise ConfigError(f"--threshold {args.threshold:g}: give a percentage of the loss, such as 1")
    if not 0 <= args.agreement <= 100:
        raise ConfigError(f"--agreement {args.agreement:g}: give a percentage from 0 to 100")
    return Bounds(args.threshold / 100, args.agreement / 100)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and fail if something was lost."""
    allowed = bounds(args)
    if args.rows < 1:
        raise ConfigError(f"--rows {args.rows}: give at least 1")
    config = read_subject_settings(args)
    adapter = args.adapter or str(Path(args.run_folder) / "adapter")
    out = console(args.json)
    from fourbit.exporting.verify import verify

    with stage_progress("verify", out) as progress:
        result = verify(
            config,
            adapter,
            args.artifacts,
            files=args.data,
            rows=args.rows,
            bounds=allowed,
            gguf_base=args.gguf_base,
            progress=progress,
        )
    if args.json:
        print_json(result.to_dict())
    else:
        print_verification(result, out)
    result.check(args.accept_loss)
    return 0


def print_verification(result: Verification, out: Console) -> None:
    """The table of a verification, what read each artifact, and which of several is the best."""
    title = f"{result.rows:,} held-out rows, {result.tokens:,} answer tokens"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for name in ("MB", "loss", "change", "answers", "top token", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    name = "adapter on its base" if result.adapter is not None else "base"
    table.add_row(name, "", f"{result.reference.loss:.4f}", "", f"{result.reference.answers:.1%}", "", "")
    for one in result.checked:
        table.add_row(*_figures(one, result.rows), style="red" if one.losses or one.defects else None)
    out.print(table)
    for one in result.checked:
        out.print(f"{one.artifact}: read by {one.measured.reader}", highlight=False, soft_wrap=True)
    if len(result.checked) > 1:
        out.print(f"lowest loss: {result.best.artifact}", highlight=False, soft_wrap=True)


def _figures(one: Checked, rows: int) -> list[str]:
    return [
        Path(one.artifact).name,
        f"{one.bytes / 1e6:,.0f}",
        f"{one.measured.loss:.4f}",
        f"{one.loss_change:+.1%} ±{one.loss_error:.1%}",
        f"{one.measured.answers:.1%}",
        f"{one.agreement:.1%}",
        "" if one.same_tokens is None else f"{one.same_tokens:,}/{rows:,}",
    ]
