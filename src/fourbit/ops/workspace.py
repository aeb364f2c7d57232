"""Memory for large results: huge pages, and one reused buffer for what one operator needs only inside.

A training step restores every weight matrix several times. Memory fresh from the system costs one page
fault for every 4 KiB written, which takes several times as long as restoring the weight into it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_WORTH_ADVISING = 4 << 20
_MADV_HUGEPAGE = 14  # of Linux

_local = threading.local()


def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor of `shape`, valid until this thread's next call.

    The next call with the same dtype and device, on this thread and CUDA stream, returns the same
    memory: use it within one operator and never return or save it. It only ever grows.
    """
    stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    buffers: dict[tuple[torch.dtype, torch.device, int], Tensor] = _local.__dict__.setdefault("buffers", {})
    key, numel = (dtype, device, stream), prod(shape)
    if key not in buffers or buffers[key].numel() < numel:
        buffers.pop(key, None)  # before allocating, so that the two never add up
        # A tensor born in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            buffers[key] = allocate((numel,), dtype, device)
    return buffers[key][:numel].view(shape)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on Linux a large CPU tensor gets huge pages where the system grants them."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and out.nbytes >= _WORTH_ADVISING and (advise := _madvise()) is not None:
        start = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (out.data_ptr() + out.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        advise(start, end - start, _MADV_HUGEPAGE)  # a hint: a refusal changes nothing
    return out


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
