"""The peak of live tensor bytes while code runs on tensors that take no memory.

Under `fake_tensors` tensors have shapes and lifetimes but no storage behind them, so a training step of any
size runs in a moment through the very code that will train, and its peak is read off instead of guessed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of every storage that an operator returns, from its first sight to its end.

    live, peak  bytes; the tensors of `known` were there before and do not count
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


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
