"""`fourbit export`: a run or a model in a format that a serving engine reads."""

from __future__ import annotations

import argparse
from typing import Any

from fourbit.cli.checked import add_check_arguments, choose_target, find_reference
from fourbit.cli.common import console, stage_progress
from fourbit.cli.merge import add_origin_arguments, finish


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a run for a serving engine",
        description="Write a run, or a model with or without an adapter, for a serving engine, and print the "
        "command that serves it. An adapter is merged on the way.",
        epilog="example: fourbit export runs/demo --to gguf --quant Q8_0 demo-Q8_0.gguf",
    )
    add_origin_arguments(parser)
    add_check_arguments(parser)
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "bnb", "gguf", "lora-gguf", "gptq", "awq"),
        help="hf: 16-bit safetensors; bnb: bitsandbytes 4-bit; gguf: one file for llama.cpp and Ollama; "
        "lora-gguf: the adapter alone; gptq, awq: 4-bit for vLLM, calibrated",
    )
    parser.add_argument("--quant", help="of a gguf: F32, F16 (default), BF16, Q8_0, Q4_0, Q4_K_M, ...")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of what stays unquantized (default bfloat16)",
    )
    parser.add_argument(
        "--calibrate",
        action="append",
        default=[],
        metavar="FILE",
        help="rows to calibrate gptq and awq on (default: the run's training rows)",
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="of gptq and awq (default: the largest that fits)"
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="make the environment that gptq and awq need, where there is none (downloads up to 3 GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    parser.add_argument("--json", action="store_true", help="print JSON, progress on standard error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, read the result back, and print what serves it."""
    out = console(args.json)
    reference = find_reference(args, args.to, out)
    from fourbit.exporting.export import export

    into = args.into if args.to == "lora-gguf" else choose_target(args, reference, out)
    with stage_progress("export", out) as progress:
        result = export(
            args.source,
            args.output,
            to=args.to,
            adapter=args.adapter,
            quant=args.quant,
            into=into,
            original=args.original,
            dtype=args.dtype,
            any_base=args.any_base,
            data=args.calibrate,
            group_size=args.group_size,
            install=args.install,
            overwrite=args.overwrite,
            progress=progress,
        )
    finish(args, reference, result, out)
    return 0
