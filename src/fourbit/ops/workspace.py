"""One reused buffer per thread, device and dtype, for what is needed only during one operator.

A training step restores every weight matrix several times; allocating and returning those hundreds of
megabytes each time costs page faults and fragments the heap.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

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
            buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffers[key][:numel].view(shape)
