"""`fourbit quantize`: a 16-bit model in, a 4-bit checkpoint out that bitsandbytes users can load.

A mixture of experts is written as one that fourbit loads, since bitsandbytes' format has no packed experts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fourbit.cli.common import console, print_json, stage_progress
from fourbit.defaults import BLOCK_SIZES
from fourbit.errors import ConfigError, ModelError


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "quantize",
        help="write a model as a 4-bit checkpoint",
        description="Quantize a model and save it as a bitsandbytes 4-bit checkpoint; a mixture of experts, "
        "whose experts have no place there, as one that fourbit loads.",
        epilog="example: fourbit quantize models/SmolLM2-135M models/SmolLM2-135M-nf4",
    )
    parser.add_argument("model", help="a folder, a hub name or a .gguf file")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--quant-type", choices=("nf4", "fp4", "int4"), default="nf4")
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=64)
    parser.add_argument(
        "--no-double-quant", action="store_true", help="keep the scales in fp32 (4.5 bits per weight)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantize and save; refuses a folder that holds something, and what the format cannot express."""
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not args.overwrite:
        raise ConfigError(f"{output}: exists and is not empty; choose another folder, or --overwrite")
    from fourbit.exporting import provenance
    from fourbit.exporting.bnb import write_bnb
    from fourbit.exporting.streamed import stream_model
    from fourbit.model.save import check_savable

    check_savable(args.quant_type)
    out = console(args.json)
    model = stream_model(args.model, dtype=None, revision=args.revision)
    if model.base.scheme is not None:
        raise ModelError(f"{args.model}: is in 4 bits already; train and evaluate take it as it is")
    with stage_progress("quantize", out) as progress:
        base = provenance.describe(
            "base", model.base.path, lambda done, total: progress("identify the base", done, total)
        )
        result = write_bnb(
            model,
            output,
            quant_type=args.quant_type,
            block_size=args.block_size,
            double_quant=not args.no_double_quant,
            overwrite=args.overwrite,
            experts=True,
            kind="quantize",
            sources=[base],
            progress=progress,
        )
    layers, own = len(result.weight_error), result.own
    if args.json:
        print_json(
            {
                "folder": str(output),
                "bytes": result.bytes,
                "bits_per_weight": result.bits_per_weight,
                "layers": layers,
                "mean_weight_error": result.mean_error,
            }
        )
    else:
        out.print(
            f"wrote {output}: {layers} {'layers and stacks of experts' if own else 'linear layers'} in "
            f"{args.quant_type} "
            f"({result.bits_per_weight:.3f} bits per weight, mean relative error {result.mean_error:.2%}), "
            f"{result.bytes / 1e6:,.0f} MB in all; "
            + ("fourbit loads it" if own else "transformers loads it with bitsandbytes, fourbit as it is"),
            highlight=False,
            soft_wrap=True,
        )
    return 0
