"""The GPU engine on this machine's card: its bytes, its kernels against the card, its steps against peers.

    python benchmarks/gpu.py [PART ...] [--json] [--minutes 8]

    check    every kernel on shapes of an 8 B model and on odd ones, against `fourbit.reference`
    kernels  time of each against its own bound: bytes over the bandwidth, operations over the rate of matrix
             products, both measured here; and against bitsandbytes where it is installed
    steps    training steps of 1 B and 8 B Llama shapes, random weights, r = 16 on all linear layers, the same
             batches, against transformers + PEFT on bitsandbytes' layers where installed, else 16-bit ones;
             against LoRA on a 16-bit base with this engine; and the share of the rate of matrix products
    memory   LLaMA shapes from 7 B to 65 B under caps of memory, beside what `fourbit plan` expects (where
             pydantic is installed); paged optimizer states against unpaged ones

Without PART all of them, in this order, as the time allows: what is left out is named. Needs torch, triton,
transformers, peft and safetensors, and no build of fourbit: run it with PYTHONPATH=src. `--tiny` goes through
the same code on the smallest shapes, without a card under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from gpu_check import check
from gpu_common import DEVICE, Row
from gpu_kernels import kernels
from gpu_steps import memory, steps

#: Each part's measurements, for the smallest shapes or the real ones.
PARTS: dict[str, Callable[[bool], list[Callable[[], Row]]]] = {
    "check": check,
    "kernels": kernels,
    "steps": steps,
    "memory": memory,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print JSON at the end, too")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after so long (default 8)")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes: a try of the program itself")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {unknown.pop()}; there are {', '.join(PARTS)}")
    if DEVICE.type == "cpu" and not arguments.tiny:
        sys.exit("no CUDA device here; --tiny under TRITON_INTERPRET=1 tries the program itself")
    began = time.monotonic()
    rows: list[Row] = []
    for part in arguments.parts or PARTS:
        for make in PARTS[part](arguments.tiny):
            if time.monotonic() - began > 60 * arguments.minutes:
                rows.append({"part": part, "what": "the rest", "note": "left out: no time"})
                break
            rows.append({"part": part, **attempt(make)})
            print(line(rows[-1]), flush=True)
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
    return int(any(row.get("equal") is False or "failed" in row for row in rows))


def attempt(make: Callable[[], Row]) -> Row:
    """What a measurement gives; where it fails, why, so that the others go on."""
    try:
        return make()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {"what": getattr(make, "what", "?"), "failed": reason[:160]}


def machine() -> Row:
    found: Row = {"torch": torch.__version__, "device": str(DEVICE)}
    for name in ("triton", "transformers", "peft", "bitsandbytes"):
        if find_spec(name):
            found[name] = __import__(name).__version__
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        found |= {"card": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return found


def line(row: Row) -> str:
    shown = [f"{row['part']:8}{row['what']:44}"]
    for key, value in row.items():
        if key not in ("part", "what"):
            shown.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(shown)


if __name__ == "__main__":
    sys.exit(main())
