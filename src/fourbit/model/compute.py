"""Which dtype matrix products run in, decided by the hardware and, on a CPU, by a short measurement."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from fourbit.errors import ConfigError

_ROWS, _INNER, _COLUMNS, _REPEATS = 512, 1024, 1024, 5


@dataclass(frozen=True)
class ComputeDtype:
    """A dtype and the sentence that says why."""

    dtype: torch.dtype
    reason: str


def choose_device(requested: str) -> torch.device:
    """cuda where there is one and none was named; raises ConfigError for a device that is not there."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise ConfigError(f"model.device = '{requested}': not a device; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"model.device = '{requested}': this torch sees no CUDA device; `fourbit doctor` says why"
        )
    return device


def choose_compute_dtype(requested: str = "auto", device: torch.device | None = None) -> ComputeDtype:
    """Resolve "auto", "bfloat16", "float16" or "float32" for a device (default: CPU).

    Raises ConfigError for float16 on a CPU, where its products run 15 to 200 times slower than
    bfloat16's, and for bfloat16 on a GPU without it.
    """
    device = device or torch.device("cpu")
    if device.type == "cuda":
        return _on_cuda(requested, device)
    if requested == "float16":
        raise ConfigError(
            "model.compute_dtype = 'float16': on a CPU float16 products run 15 to 200 times slower; "
            "use bfloat16, float32 or auto"
        )
    if requested != "auto":
        return ComputeDtype(getattr(torch, requested), "as set")
    return _faster_on_cpu()


def _on_cuda(requested: str, device: torch.device) -> ComputeDtype:
    major, minor = torch.cuda.get_device_capability(device)
    if requested == "bfloat16" and major < 8:
        raise ConfigError(
            f"model.compute_dtype = 'bfloat16': compute capability {major}.{minor} has none (8.0 has); "
            "use float16 or auto"
        )
    if requested != "auto":
        return ComputeDtype(getattr(torch, requested), "as set")
    if major >= 8:
        return ComputeDtype(torch.bfloat16, f"compute capability {major}.{minor} has bfloat16")
    return ComputeDtype(torch.float16, f"compute capability {major}.{minor} has no bfloat16")


@cache
def _faster_on_cpu() -> ComputeDtype:
    seconds = {dtype: _time_product(dtype) for dtype in (torch.bfloat16, torch.float32)}
    bf16, fp32 = seconds[torch.bfloat16], seconds[torch.float32]
    gflops = {dtype: 2e-9 * _ROWS * _INNER * _COLUMNS / s for dtype, s in seconds.items()}
    figures = f"{gflops[torch.bfloat16]:.0f} against {gflops[torch.float32]:.0f} GFLOP/s"
    if bf16 <= fp32:
        return ComputeDtype(
            torch.bfloat16, f"bfloat16 products are {fp32 / bf16:.1f}x faster here, {figures}"
        )
    return ComputeDtype(torch.float32, f"bfloat16 products are {bf16 / fp32:.1f}x slower here, {figures}")


def _time_product(dtype: torch.dtype) -> float:
    left = torch.ones(_ROWS, _INNER, dtype=dtype)
    right = torch.ones(_COLUMNS, _INNER, dtype=dtype)
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        torch.mm(left, right.t())
        times.append(time.perf_counter() - start)
    return median(times[1:])
