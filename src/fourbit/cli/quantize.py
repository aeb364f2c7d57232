"""`fourbit quantize`: a 16-bit model in, a 4-bit checkpoint out that bitsandbytes users can load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fourbit.cli.common import console, print_json, stage_progress
from fourbit.config import BLOCK_SIZES
from fourbit.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "quantize",
        help="write a model as a 4-bit checkpoint",
        description="Quantize a model and save it as a bitsandbytes 4-bit checkpoint.",
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
    from fourbit.model.load import load, load_report
    from fourbit.model.save import check_savable, save_quantized

    check_savable(args.quant_type)
    out = console(args.json)
    model, tokenizer = load(
        args.model,
        quant_type=args.quant_type,
        block_size=args.block_size,
        double_quant=not args.no_double_quant,
        compute_dtype="bfloat16",  # of norms and embeddings: what the checkpoint will hold
        device="cpu",
        revision=args.revision,
    )
    report = load_report(model)
    out.print(report.line(), highlight=False, soft_wrap=True)
    size = save_quantized(model, tokenizer, output)
    with stage_progress("quantize", out) as progress:
        place = Path(str(model.name_or_path))
        base = provenance.describe(
            "base", place, lambda done, total: progress("identify the base", done, total)
        )
    settings = {
        "quant_type": args.quant_type,
        "block_size": args.block_size,
        "double_quant": not args.no_double_quant,
    }
    effect = {"bytes": size, "bits_per_weight": report.bits_per_weight}
    step = provenance.make_step("quantize", [base], settings, effect)
    provenance.write(output, [*provenance.read(place), step])
    if args.json:
        print_json(
            {
                "folder": str(output),
                "bytes": size,
                "bits_per_weight": report.bits_per_weight,
                "layers": report.converted,
            }
        )
    else:
        out.print(
            f"wrote {output}: {size / 1e6:,.0f} MB; "
            "transformers loads it with bitsandbytes, fourbit as it is",
            highlight=False,
        )
    return 0
