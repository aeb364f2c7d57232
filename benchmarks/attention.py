"""Causal attention, forward and backward, beside torch's on this machine's CPU.

    python benchmarks/attention.py [--dtype bfloat16] [--rounds 9] [--threads N] [--json]

9 heads of 64 values, 3 of them keys and values (SmolLM2), rows of 512 and 2,048 tokens. Torch's is
`scaled_dot_product_attention` with `is_causal`. Both take turns within one process; medians are compared, and
both are set against fp64 first.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import median
from time import perf_counter
from typing import Any

import torch
from machine import machine
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fourbit.nn.attention import TiledAttention

HEADS, KV_HEADS, WIDTH, LENGTHS = 9, 3, 64, (512, 2048)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=9, help="turns that each gets (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    report: dict[str, Any] = {"machine": machine(), "dtype": arguments.dtype}
    report["results"] = [compare(length, dtype, arguments.rounds) for length in LENGTHS]
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def compare(length: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = [(1, heads, length, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    grad = torch.randn(1, length, HEADS, WIDTH).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = results(stock(*exact), exact, grad.double())
    errors = {
        name: max(
            float((found.double() - true).norm() / true.norm())
            for found, true in zip(results(side(*inputs), inputs, grad), truth, strict=True)
        )
        for name, side in SIDES.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, side in SIDES.items():
            began = perf_counter()
            torch.autograd.grad(side(*inputs), inputs, grad)
            taken[name].append(perf_counter() - began)
    return {
        "tokens": length,
        "seconds": {name: median(times) for name, times in taken.items()},
        "ratio": median(theirs / ours for ours, theirs in zip(*taken.values(), strict=True)),
        "largest_error": errors,
    }


def results(output: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = torch.zeros(len(q), q.shape[2], dtype=torch.int32)
    found: Tensor = TiledAttention.apply(q, k, v, first, WIDTH**-0.5)
    return found


def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


SIDES = {"fourbit": ours, "torch": stock}


def table(report: dict[str, Any]) -> str:
    lines = [f"{key:16} {value}" for key, value in report["machine"].items()]
    lines += [
        "",
        f"{report['dtype']}, {HEADS} heads of {WIDTH}, {KV_HEADS} of keys; forward and backward",
        "",
    ]
    lines.append(f"{'tokens':8}{'fourbit':>12}{'torch':>12}{'ratio':>8}{'errors':>24}")
    for row in report["results"]:
        times = "".join(f"{1e3 * taken:9.2f} ms" for taken in row["seconds"].values())
        errors = ", ".join(f"{error:.2e}" for error in row["largest_error"].values())
        lines.append(f"{row['tokens']:<8,}{times}{row['ratio']:7.1f}x{errors:>24}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
