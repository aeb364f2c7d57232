"""The codec against bitsandbytes on this machine's CPU: quantize, restore, one-row product.

    python benchmarks/codec.py [--rounds 7] [--threads N] [--json]

Both run in turns within one process, so that whatever slows the machine slows both; medians are
compared. Results are checked against each other first: codes, scales and restored weights byte for byte,
products within the rounding of bf16.

bitsandbytes multiplies one row by its packed weight only in `Linear4bit.eval()`, which lays the weight
out anew in place; without AVX-512 BF16 it restores the whole weight instead. Both ways are timed where
both exist, and the faster one counts. What fourbit multiplies is always the layout that is saved.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from machine import machine

from fourbit import functional as F4
from fourbit.nn.linear import Linear4bit
from fourbit.ops import restore_into

SHAPE = (4096, 11008)  # out, in: the down projection of a 7B model
#: Ratios to reach: times as fast as bitsandbytes.
TARGETS = {
    "quantize": 20.0,
    "restore": 3.0,
    "restore into a buffer": 3.0,
    "one row": 1.0,
    "one row, two scales": 1.0,
    "one row, from memory": 1.0,
}
#: Weights multiplied in turn so that none is left in a cache: 25 MB each.
UNCACHED = 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns that each side gets (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    report = {"machine": machine(), "shape": SHAPE, "rounds": arguments.rounds, "results": []}
    for name, ours, theirs, repeat in cases():
        report["results"].append(compare(name, ours, theirs, arguments.rounds, repeat))
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def cases() -> list[tuple[str, Callable[[], Any], list[Callable[[], Any]], int]]:
    """What is compared: (name, fourbit's call, bitsandbytes' calls, calls per turn), results checked."""
    w = (torch.randn(SHAPE) * 0.02).bfloat16()
    codes, state = bnb.quantize_4bit(w, quant_type="nf4")
    q = F4.quantize_4bit(w)
    expect("codes", torch.equal(q.codes, codes.view(-1)))
    expect("scales", torch.equal(q.absmax, state.absmax))
    restored = bnb.dequantize_4bit(codes, state)
    expect("restored weights", torch.equal(F4.dequantize_4bit(q), restored))
    found = [
        ("quantize", lambda: F4.quantize_4bit(w), [lambda: bnb.quantize_4bit(w, quant_type="nf4")], 1),
        ("restore", lambda: F4.dequantize_4bit(q), [lambda: bnb.dequantize_4bit(codes, state)], 3),
    ]

    # What training does; bitsandbytes allocates its result each time and offers nothing else on a CPU.
    buffer = torch.empty(SHAPE, dtype=torch.bfloat16)
    parts = (q.codes, q.absmax, q.nested_absmax, q.offset, q.codebook, q.block_size)
    found.append(
        (
            "restore into a buffer",
            lambda: restore_into(buffer, *parts),
            [lambda: bnb.dequantize_4bit(codes, state)],
            3,
        )
    )

    x = torch.randn(1, SHAPE[1]).bfloat16()
    for name, nested in (("one row", False), ("one row, two scales", True)):
        layer = Linear4bit.from_quantized(F4.quantize_4bit(w, double_quant=nested))
        rivals = rival_layers(w, nested)
        with torch.no_grad():
            truth = torch.nn.functional.linear(x.double(), layer.dequantize(torch.float32).double())
            for label, run in (("fourbit", layer), *(("bitsandbytes", rival) for rival in rivals)):
                # bf16 has 8 bits; rivals also round scales to it, over 11,008 products.
                error = ((run(x).double() - truth).norm() / truth.norm()).item()
                expect(f"product of {label}", error < 2**-7)
        calls = [no_grad(rival, x) for rival in rivals]
        found.append((name, no_grad(layer, x), calls, 10))

    # As in a model larger than the caches.
    own = cycle([no_grad(Linear4bit.from_quantized(F4.quantize_4bit(w)), x) for _ in range(UNCACHED)])
    rival = cycle([no_grad(rival_layers(w, False)[0], x) for _ in range(UNCACHED)])
    found.append(("one row, from memory", lambda: next(own)(), [lambda: next(rival)()], 2 * UNCACHED))
    return found


def rival_layers(w: torch.Tensor, nested: bool) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """bitsandbytes' own ways to multiply: its layer in inference, and on the weight as quantized."""
    layer = bitsandbytes.nn.Linear4bit(
        SHAPE[1],
        SHAPE[0],
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=nested,
        quant_type="nf4",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        w, requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    layer = layer.to("cpu").eval()
    codes, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    return [layer, lambda x: bitsandbytes.matmul_4bit(x, codes, quant_state=state)]


def no_grad(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return torch.no_grad()(lambda: run(x))


def expect(what: str, right: bool) -> None:
    if not right:
        sys.exit(f"{what}: fourbit and bitsandbytes disagree, so their times mean nothing")


def compare(
    name: str, ours: Callable[[], Any], theirs: list[Callable[[], Any]], rounds: int, repeat: int
) -> dict[str, Any]:
    """Medians of `rounds` turns each, in milliseconds; the fastest of `theirs` counts.

    A turn starts with an untimed call, so that nobody pays for what the one before left in the caches.
    """
    times: list[list[float]] = [[] for _ in (ours, *theirs)]
    for _ in range(rounds):
        for call, taken in zip((ours, *theirs), times, strict=True):
            call()
            start = perf_counter()
            for _ in range(repeat):
                call()
            taken.append((perf_counter() - start) / repeat * 1e3)
    own, rival = median(times[0]), min(median(taken) for taken in times[1:])
    return {
        "name": name,
        "fourbit_ms": own,
        "bitsandbytes_ms": rival,
        "ratio": rival / own,
        "target": TARGETS[name],
        "weights_per_second": SHAPE[0] * SHAPE[1] / own * 1e3,
        "turns_ms": times,
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"{key:16} {value}" for key, value in report["machine"].items()]
    lines += [f"{'weight':16} {SHAPE[0]} x {SHAPE[1]} bf16, NF4, block size 64", ""]
    lines.append(f"{'':24}{'fourbit':>10} {'bitsandbytes':>13} {'ratio':>8} {'target':>8}")
    for row in report["results"]:
        lines.append(
            f"{row['name']:24}{row['fourbit_ms']:7.2f} ms {row['bitsandbytes_ms']:10.2f} ms "
            f"{row['ratio']:7.1f}x {row['target']:7.1f}x"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
