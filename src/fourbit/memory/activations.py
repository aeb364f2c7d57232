"""Inputs of checkpointed layers that wait for backward in another tier: in a file, or in host memory.

With activation checkpointing the forward pass leaves one tensor [B, T, hidden] for each decoder layer.
Backward takes them in the opposite order, so they are a stack: a thread writes each as the next layer
computes, and reads the one below while a layer is recomputed. A few of them are in memory at a time, whatever
the depth.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from fourbit.memory.scratch import ScratchFile

#: Layer inputs in memory at a time: two that are written, or one that is used and one that is read.
IN_MEMORY = 2
#: Smaller tensors stay where they are: positions, lengths.
_SMALLEST = 64 << 10
_CHECKPOINTING = "_gradient_checkpointing_func"


@dataclass(eq=False)
class _Kept:
    """A tensor that waits in the file, from byte `start` on; `place` in the stack."""

    place: int
    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    size: int
    written: Future[None]
    read: Future[Tensor] | None = None


class ActivationFile:
    """Tensors that autograd saves within `hooks` wait in a file without a name, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._file = ScratchFile(folder, "activations", "keep them in memory (train.activation_tier: device)")
        # One thread, so that what is read was written before.
        self._worker = ThreadPoolExecutor(1, "fourbit-activations")
        self._stack: list[weakref.ref[_Kept]] = []

    def hooks(self) -> AbstractContextManager[Any]:
        """A block in which what autograd saves goes to the file. Backward may raise TrainingError then."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def close(self) -> None:
        """Give the file back."""
        self._worker.shutdown()
        self._file.close()

    def _pack(self, tensor: Tensor) -> Tensor | _Kept:
        if tensor.nbytes < _SMALLEST:
            return tensor
        while self._stack and self._stack[-1]() is None:  # used, or given up with its step
            self._stack.pop()
        place = len(self._stack)
        below = self._stack[-1]() if self._stack else None
        start = below.start + below.size if below is not None else 0
        if place >= IN_MEMORY:
            waiting = self._stack[1 - IN_MEMORY]()
            if waiting is not None:
                waiting.written.result()
        self._file.reserve(start + tensor.nbytes)
        written = self._worker.submit(self._write, start, tensor.detach())
        kept = _Kept(place, start, tensor.shape, tensor.dtype, tensor.device, tensor.nbytes, written)
        self._stack.append(weakref.ref(kept))
        return kept

    def _unpack(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        kept.written.result()
        tensor = (kept.read or self._worker.submit(self._read, kept)).result()
        kept.read = None
        below = self._stack[kept.place - 1]() if kept.place else None
        if below is not None and below.read is None:
            below.read = self._worker.submit(self._read, below)
        return tensor

    def _write(self, start: int, tensor: Tensor) -> None:
        self._file.write(start, tensor.cpu().contiguous().view(-1).view(torch.uint8))

    def _read(self, kept: _Kept) -> Tensor:
        found = torch.empty(kept.shape, dtype=kept.dtype)
        self._file.read(kept.start, found.view(-1).view(torch.uint8))
        return found.to(kept.device)


@contextmanager
def checkpoints_in(tier: str, model: nn.Module, folder: Path) -> Iterator[None]:
    """Within this block the inputs of a model's checkpointed layers wait in a tier.

    tier   device: where they are; host: host memory, pinned where there is a GPU; disk: a file in folder
    model  of transformers, its activation checkpointing on
    """
    if tier == "device":
        yield
        return
    store = ActivationFile(folder) if tier == "disk" else None
    pinned = torch.cuda.is_available()
    layers = [module for module in model.modules() if hasattr(module, _CHECKPOINTING)]
    before = [getattr(layer, _CHECKPOINTING) for layer in layers]

    def moving(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint_elsewhere(*args: Any, **kwargs: Any) -> Any:
            with store.hooks() if store is not None else save_on_cpu(pin_memory=pinned):
                return checkpoint(*args, **kwargs)

        return checkpoint_elsewhere

    try:
        for layer, checkpoint in zip(layers, before, strict=True):
            setattr(layer, _CHECKPOINTING, moving(checkpoint))
        yield
    finally:
        for layer, checkpoint in zip(layers, before, strict=True):
            setattr(layer, _CHECKPOINTING, checkpoint)
        if store is not None:
            store.close()
