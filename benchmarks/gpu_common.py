"""What the parts of `gpu.py` share: the device, its dtypes, names and times."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: 16 bits: bf16 where the card has it. Triton's interpreter does not round to bf16 as cards do.
HALF = torch.bfloat16 if DEVICE.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16
FLOATS = tuple(dict.fromkeys((torch.float32, torch.float16, HALF)))

Row = dict[str, Any]


def named(what: str, make: Callable[[], Row]) -> Callable[[], Row]:
    def run() -> Row:
        return {"what": what, **make()}

    run.what = what  # type: ignore[attr-defined]
    return run


def seconds(call: Callable[[], Any], times: int = 20) -> float:
    """Median of single calls."""
    for _ in range(3 if DEVICE.type == "cuda" else 0):
        call()
    taken = []
    for _ in range(times if DEVICE.type == "cuda" else 1):
        if DEVICE.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return median(taken)
