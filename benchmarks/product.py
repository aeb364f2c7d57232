"""Products of many rows with 4-bit weights on this machine's CPU, beside torch.mm and bitsandbytes.

    python benchmarks/product.py [--dtype bfloat16] [--rounds 15] [--threads N] [--json]

For the shapes of SmolLM2-135M and of a 1.1 B Llama, forward and backward, in GFLOP/s of the base's product:

    torch.mm      of the restored weight, which is at hand: what the machine gives
    fourbit       of the packed weight
    restored      of the packed weight, restored whole before torch.mm
    adapter       of the packed weight with LoRA r = 16, dropout 0.05, in backward A's and B's gradients too
    bitsandbytes  matmul_4bit, without an adapter

All take turns within one process; medians are compared. Results are checked against each other first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from machine import machine

from fourbit import functional as F4
from fourbit.kernels.product import Adapter, Dropout, Packed, has_product, product, product_grad
from fourbit.ops import restore_into

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048), (5632, 2048))
ROWS = (32, 160, 512, 2048)
RANK = 16
NAMES = ("torch.mm", "fourbit", "restored", "adapter", "bitsandbytes")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=15, help="turns that each gets (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    if not has_product(dtype):
        sys.exit(
            f"{arguments.dtype}: this processor has no product of its own for it, fourbit leaves it to torch"
        )
    report: dict[str, Any] = {"machine": machine(), "dtype": arguments.dtype, "results": []}
    for n, k in SHAPES:
        for rows in ROWS:
            report["results"].append(compare(n, k, rows, dtype, arguments.rounds))
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def compare(n: int, k: int, rows: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    both = {}
    for direction, calls in cases(n, k, rows, dtype).items():
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(rounds + 1):
            for name in NAMES:
                began = perf_counter()
                calls[name]()
                times[name].append(perf_counter() - began)
        work = 2e-9 * rows * n * k
        both[direction] = {name: work / median(taken[1:]) for name, taken in times.items()}
    return {"out": n, "in": k, "rows": rows, **both}


def cases(n: int, k: int, rows: int, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    q = F4.quantize_4bit(torch.randn(n, k), double_quant=True)
    dense = F4.dequantize_4bit(q, dtype)
    weight = Packed(n, k, *F4.parts_of(q))
    x, grad = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
    keys = Dropout(torch.arange(rows) // 40, torch.arange(rows) % 40, 1, 2, 3, 0.05)
    adapter = Adapter(torch.randn(RANK, k), torch.zeros(n, RANK), 2.0, keys)
    low = product(x, weight, None, adapter)[1]
    buffer = torch.empty(n, k, dtype=dtype)
    codes, state = bnb.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    theirs = x.clone().requires_grad_()

    def restored(left: torch.Tensor, transposed: bool) -> torch.Tensor:
        restore_into(buffer, *F4.parts_of(q))
        return left @ (buffer.t() if transposed else buffer)

    def bitsandbytes_backward() -> None:
        (bitsandbytes.matmul_4bit(theirs, codes, quant_state=state) * 1).backward(grad)

    expect(product(x, weight)[0], x @ dense.t())
    expect(product_grad(grad, weight)[0], grad @ dense)
    return {
        "forward": {
            "torch.mm": lambda: x @ dense.t(),
            "fourbit": lambda: product(x, weight),
            "restored": lambda: restored(x, True),
            "adapter": lambda: product(x, weight, None, adapter),
            "bitsandbytes": lambda: bitsandbytes.matmul_4bit(x, codes, quant_state=state),
        },
        "backward": {
            "torch.mm": lambda: grad @ dense,
            "fourbit": lambda: product_grad(grad, weight),
            "restored": lambda: restored(grad, False),
            "adapter": lambda: product_grad(grad, weight, adapter, x=x, low=low, needs_adapter=True),
            "bitsandbytes": bitsandbytes_backward,  # runs forward too
        },
    }


def expect(got: torch.Tensor | None, truth: torch.Tensor) -> None:
    assert got is not None
    if (got.double() - truth.double()).norm() > 2**-7 * truth.double().norm():
        sys.exit("fourbit and torch disagree, so their times mean nothing")


def table(report: dict[str, Any]) -> str:
    lines = [f"{key:16} {value}" for key, value in report["machine"].items()]
    lines += ["", f"{report['dtype']}, NF4, blocks of 64, double quantization; GFLOP/s", ""]
    for direction in ("forward", "backward"):
        names = "".join(f"{name:>13}" for name in NAMES)
        lines.append(f"{direction:10}{'rows':>14}{names}")
        for row in report["results"]:
            speeds = "".join(f"{row[direction][name]:13,.0f}" for name in NAMES)
            lines.append(f"{row['out']:5} x {row['in']:5}{row['rows']:11,}{speeds}")
        lines.append("")
    return "\n".join([*lines, "bitsandbytes' backward includes its forward."])


if __name__ == "__main__":
    sys.exit(main())
