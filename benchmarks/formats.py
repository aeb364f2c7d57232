"""One run in every format that serving engines read: bytes, loss, answers, likeliest tokens.

    python benchmarks/formats.py RUN --data demo/banking77/test.csv [--rows 1000] [--install]

Each artifact is written by `fourbit.merge` or `fourbit.export`, read back by the engine's own software and
compared by `fourbit verify` with the adapter on its 4-bit base, on the same rows, which the run must not have
trained on; without --data on those it held out. An artifact that lies in the output folder already is not
written again; one that cannot be written is named below the table with the reason. GPTQ and AWQ run in an
environment of their own, which --install makes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fourbit.cli.common import stage_progress
from fourbit.config_file import load_config
from fourbit.diagnose.machine import check_cores
from fourbit.errors import ConfigError, FourBitError
from fourbit.exporting import provenance
from fourbit.exporting.export import export, merge
from fourbit.exporting.streamed import Progress
from fourbit.exporting.verification import Checked, Verification
from fourbit.exporting.verify import verify
from fourbit.model.load import load
from fourbit.model.save import save_quantized

#: What the LoRA GGUF is put on.
BASE = "base-F16.gguf"
RESTORED = {"into": "dequantized"}
#: Readers compute in it too, so that rounding is no difference between formats.
FP32 = "model.compute_dtype=float32"

Write = Callable[..., Any]


def artifacts(run: Path, install: bool) -> dict[str, tuple[str, Write]]:
    """What is written, by name in the output folder: (what it is, the call that writes it)."""
    to = partial(export, run, **RESTORED)
    calibrated = partial(to, install=install)
    found: dict[str, tuple[str, Write]] = {
        f"merged-{dtype}": (
            f"merge into the restored weights, {dtype}",
            partial(merge, run, dtype=dtype, **RESTORED),
        )
        for dtype in ("float32", "float16", "bfloat16")
    }
    found["merged-original"] = (
        "merge into the original weights, float32",
        partial(merge, run, dtype="float32", into="original"),
    )
    found["bnb"] = ("restored merge in 4 bits again (bitsandbytes)", partial(to, to="bnb"))
    for quant in ("F16", "Q8_0", "Q4_0", "Q4_K_M"):
        found[f"{quant}.gguf"] = (f"GGUF {quant} of the restored merge", partial(to, to="gguf", quant=quant))
    found["lora.gguf"] = ("LoRA GGUF on the 4-bit base as GGUF F16", partial(write_lora, run))
    for method in ("gptq", "awq"):
        found[method] = (f"{method.upper()} of the restored merge", partial(calibrated, to=method))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of a QLoRA run")
    parser.add_argument("--data", action="append", default=[], metavar="FILE", help="rows to compare on")
    parser.add_argument("--rows", type=int, default=1000, help="so many of them (default 1000)")
    parser.add_argument("--output", type=Path, help="where artifacts go (default: RUN/formats)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="these artifacts alone")
    parser.add_argument("--install", action="store_true", help="make the environment of GPTQ and AWQ")
    args = parser.parse_args(argv)
    try:
        compare(args, Console(stderr=True))
    except FourBitError as error:
        print(f"formats: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def compare(args: argparse.Namespace, console: Console) -> None:
    config = load_config(args.run / "config.yaml", [FP32])
    folder = args.output or args.run / "formats"
    wanted = artifacts(args.run, args.install)
    unknown = set(args.only) - set(wanted)
    if unknown:
        raise ConfigError(f"--only {min(unknown)}: known are {', '.join(wanted)}")
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    names = [name for name in wanted if not args.only or name in args.only]
    for name in names:
        if not (folder / name).exists():
            try:
                with stage_progress(f"write {name}", console) as progress:
                    wanted[name][1](folder / name, progress=progress)
            except FourBitError as error:
                failed[name] = str(error)
                console.print(f"{name}: {error}", markup=False, highlight=False)
    measured = [name for name in names if name not in failed]
    with stage_progress("verify", console) as progress:
        result = verify(
            config,
            args.run / "adapter",
            [args.run / "adapter", *(folder / name for name in measured)],
            files=args.data,
            rows=args.rows,
            gguf_base=folder / BASE,
            progress=progress,
        )
    titles = ["adapter on the original weights", *(wanted[name][0] for name in measured)]
    print(table(result, titles))
    for name, reason in failed.items():
        print(f"{wanted[name][0]}: not written ({reason})")


def write_lora(run: Path, file: Path, progress: Progress) -> None:
    """The adapter alone, and beside it the base that it was trained on, from restored 4-bit weights."""
    settings = load_config(run / "config.yaml", [FP32]).model
    model, tokenizer = load(settings.path, **settings.model_dump(exclude={"path"}))
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        save_quantized(model, tokenizer, folder)
        export(folder, file.parent / BASE, to="gguf", quant="F16", overwrite=True, progress=progress)
    export(run, file, to="lora-gguf", progress=progress)


def table(result: Verification, titles: list[str]) -> str:
    """Markdown: the reference, then a row for each artifact; changes against the reference."""
    reference = result.reference
    versions = provenance.versions()
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "code")
    lines = [
        f"{result.rows:,} rows, {result.tokens:,} answer tokens, fp32; cores: {check_cores().facts[0].text}; "
        f"{known}",
        "",
        "| | MB | loss | change | answers | points | top token | read by |",
        "|---|---|---|---|---|---|---|---|",
        f"| adapter on its 4-bit base | | {reference.loss:.4f} | | {reference.answers:.1%} | | | fourbit |",
    ]
    lines += [row(title, one, result) for title, one in zip(titles, result.checked, strict=True)]
    return "\n".join(lines)


def row(title: str, one: Checked, result: Verification) -> str:
    points = 100 * (one.measured.answers - result.reference.answers)
    reader = one.measured.reader.split(" (")[0].split(",")[-1].strip()
    change = f"{one.loss_change:+.1%} ± {one.loss_error:.1%}"
    return (
        f"| {title} | {one.bytes / 1e6:,.0f} | {one.measured.loss:.4f} | {change} | "
        f"{one.measured.answers:.1%} | {points:+.1f} | {one.agreement:.1%} | {reader} |"
    )


if __name__ == "__main__":
    sys.exit(main())
