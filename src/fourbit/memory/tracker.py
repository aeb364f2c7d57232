"""The peak of live tensor bytes while code runs on tensors that take no memory.

Under `fake_tensors` tensors have shapes and lifetimes but no storage behind them, so a training step of any
size runs in a moment through the very code that will train, and its peak is read off instead of guessed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fourbit.kernels.pool import SMALLEST, Pool

#: Operators whose results stay, as `kernels.elementwise` has them.
_STAYING = ("add.default", "add_rms_norm.default")


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of every storage that an operator returns, from its first sight to its end.

    known   tensors that were there before and do not count
    pooled  whether what kernels return lies in blocks of their pool, as it does on a CPU with native code:
            blocks that are free stay resident, so they count too

    live, peak  bytes        used  bytes of tensors alone: live without free blocks
    """

    def __init__(self, known: Iterable[Tensor] = (), pooled: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used = self.peak = 0
        self._heap = 0
        self._pool = _Blocks() if pooled else None
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    @property
    def live(self) -> int:
        return self._heap + (self._pool.resident if self._pool is not None else 0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, func)
        return result

    def _count(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        block = None
        if self._pool is not None and size >= SMALLEST and _is_pooled(func):
            block = self._pool.take(size, stays=func.__name__ in _STAYING)
            self._pool.touch(block, size)
        else:
            self._heap += size
        self._sizes[key] = size
        weakref.finalize(storage, self._forget, key, block)
        self.used += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, block: _Block | None) -> None:
        size = self._sizes.pop(key)
        self.used -= size
        if block is None:
            self._heap -= size
        else:
            assert self._pool is not None
            self._pool.give_back(block)


def _is_pooled(func: Any) -> bool:
    """Whether a kernel makes what an operator returns: ours, and what stands for them without values."""
    return func.namespace == "fourbit" or func is torch.ops.aten.new_empty.default


@dataclass(eq=False)
class _Block:
    """A block of so many bytes, of which `touched` have been written."""

    size: int
    touched: int = 0

    def __len__(self) -> int:
        return self.size


class _Blocks(Pool):
    """The pool without memory: it hands out and keeps blocks as the real one does."""

    def __init__(self) -> None:
        super().__init__()
        self.resident = 0

    def touch(self, block: _Block, size: int) -> None:
        """So much of a block is written."""
        self.resident += max(0, size - block.touched)
        block.touched = max(block.touched, size)

    def _map(self, size: int) -> _Block:
        return _Block(size)

    def _unmap(self, size: int) -> None:
        before = dict(self._free)
        super()._unmap(size)
        self.resident -= sum(block.touched for number, block in before.items() if number not in self._free)


def without_values() -> bool:
    """Whether tensors have only shapes here: code that looks at values must do without."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode() is not None


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is more than a shape: the same question, of one tensor and cheaper."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(tensor, FakeTensor)


def fake_tensors() -> Any:
    """A mode in which new tensors take no memory; real ones (codebooks) may be read.

    What code caches inside it is fake: fill caches that outlive it before.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
