"""Activation checkpointing, and its layer inputs that wait for backward in a file or in host memory.

With activation checkpointing the forward pass leaves one tensor [B, T, hidden] for each decoder layer.
Backward takes them in the opposite order, so they are a stack: a thread writes each as the next layer
computes, and reads the one below while a layer is recomputed. A few of them are in memory at a time, whatever
the depth.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from fourbit.kernels.pool import POOL
from fourbit.memory.scratch import ScratchFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        found = POOL.empty(tuple(kept.shape), kept.dtype)
        self._file.read(kept.start, found.view(-1).view(torch.uint8))
        return found.to(kept.device)


class ActivationTier:
    """Where the inputs of a model's checkpointed layers wait, within a `with` block.

    model   of transformers
    tier    device: where they are; host: host memory, pinned where there is a GPU; disk: a file in folder
    """

    def __init__(self, model: nn.Module, tier: str, folder: Path) -> None:
        self._model, self._tier, self._folder = model, tier, folder
        self._undo = ExitStack()

    def __enter__(self) -> ActivationTier:
        self.use(self._tier)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def use(self, tier: str) -> None:
        """From now on they wait there."""
        self._undo.close()
        if tier == "disk":
            store = ActivationFile(self._folder)
            self._undo.callback(store.close)
            self._checkpoint_within(store.hooks)
        elif tier == "host":
            self._checkpoint_within(partial(save_on_cpu, pin_memory=torch.cuda.is_available()))

    def _checkpoint_within(self, block: Callable[[], AbstractContextManager[Any]]) -> None:
        for layer in self._model.modules():
            checkpoint = getattr(layer, _CHECKPOINTING, None)
            if checkpoint is not None:
                self._undo.callback(setattr, layer, _CHECKPOINTING, checkpoint)
                setattr(layer, _CHECKPOINTING, partial(_within, block, checkpoint))


def _within(
    block: Callable[[], AbstractContextManager[Any]], call: Callable[..., Any], *args: Any, **named: Any
) -> Any:
    with block():
        return call(*args, **named)


def checkpoint_activations(base: PreTrainedModel) -> None:
    """Keep only the inputs of decoder layers and recompute the rest in backward."""
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def keep_activations(base: PreTrainedModel) -> None:
    """Keep what backward reads, and recompute nothing."""
    disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
    disable()
