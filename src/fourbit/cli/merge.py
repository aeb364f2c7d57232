"""`fourbit merge`: an adapter into its base, as a 16-bit model folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from fourbit.cli.checked import add_check_arguments, check_result, choose_target, find_reference
from fourbit.cli.common import console, print_json, stage_progress


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "merge",
        help="put an adapter into its base's weights",
        description="Merge a run's adapter, or another PEFT LoRA adapter, into its base and write 16-bit "
        "safetensors, tensor by tensor.",
        epilog="example: fourbit merge runs/demo models/demo-merged",
    )
    add_origin_arguments(parser)
    add_check_arguments(parser)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the result"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    parser.add_argument("--json", action="store_true", help="print JSON, progress on standard error")
    parser.set_defaults(run=run)


def add_origin_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN or MODEL, OUT, --adapter; and what an adapter is merged into."""
    parser.add_argument(
        "source", metavar="RUN", help="run folder, or a model: a folder, a hub name or a .gguf file"
    )
    parser.add_argument("output", metavar="OUT", help="what to write")
    parser.add_argument("--adapter", help="PEFT adapter folder (default: the run's)")
    parser.add_argument(
        "--into",
        choices=("original", "dequantized"),
        help="merge into the original weights or the restored 4-bit ones (default: of a run those with the "
        "lower held-out loss, else the original ones when at hand)",
    )
    parser.add_argument(
        "--original", metavar="MODEL", help="where the original weights are, if the base is in 4 bits"
    )
    parser.add_argument(
        "--any-base", action="store_true", help="accept another base than the adapter's record names"
    )


def run(args: argparse.Namespace) -> int:
    """Merge, say into what, and read it back."""
    out = console(args.json)
    reference = find_reference(args, "hf", out)
    from fourbit.exporting.export import merge

    into = choose_target(args, reference, out)
    with stage_progress("merge", out) as progress:
        result = merge(
            args.source,
            args.output,
            adapter=args.adapter,
            into=into,
            original=args.original,
            dtype=args.dtype,
            any_base=args.any_base,
            overwrite=args.overwrite,
            progress=progress,
        )
    finish(args, reference, result, out)
    return 0


def finish(args: argparse.Namespace, reference: Any, result: Any, out: Console) -> None:
    """Say what was written, read it back, and say what serves it."""
    if not args.json:
        _print_written(result, out)
    verification = check_result(args, reference, Path(result.place), out)
    if args.json:
        print_json({**result.to_dict(), "verification": verification})
        return
    for command in result.commands:
        out.print(f"serve it: {command}", highlight=False, soft_wrap=True, markup=False)


def _print_written(result: Any, out: Console) -> None:
    lines = result.merge.lines() if result.merge is not None else []
    if result.requantized is not None:
        name, error = result.requantized.worst
        lines.append(
            f"quantized again, {result.requantized.bits_per_weight:.3f} bits per weight: relative error of "
            f"a weight {result.requantized.mean_error:.4f} on average, at most {error:.4f} ({name})"
        )
    lines.append(f"wrote {result.place}: {result.bytes / 1e6:,.0f} MB")
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True, markup=False)
