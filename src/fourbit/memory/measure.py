"""Resident memory of this process, as the operating system counts it, and what the C library holds of it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil
import torch

from fourbit.kernels.pool import POOL

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGER_BLOCK = 256 << 10


def peak_resident_bytes() -> int:
    """Highest resident set so far, file-backed pages included (VmHWM on Linux)."""
    if sys.platform == "linux":
        # Not getrusage: its figure begins at the peak of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the BSDs kilobytes


def resident_bytes() -> int:
    """The resident set now, file-backed pages included."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """The peak that matters for a device: allocated device memory on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def compact_heap() -> None:
    """From now on give every larger block back to the system as it is freed, where the C library can (glibc).

    Kept in the heap, blocks of a training step leave holes that add a tenth to a half to its peak, and in no
    two runs the same. Fresh from the system each costs page faults, which are little beside a step's products
    while what kernels return comes from a pool (docs/log.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGER_BLOCK)


def release_free_memory() -> None:
    """Give back to the system what is free: of kernels' results, and inside the heap where glibc can.

    One phase's buffers would otherwise stay resident under the next one's peak.
    """
    POOL.release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
