"""Tensors that are read when transformers asks for them, so that a load never holds two of them.

`from_pretrained(state_dict=...)` takes each entry, evaluates `entry[...]`, casts it to the model's
dtype, and assigns or quantizes it before it takes the next. `LazyTensor` is such an entry.
`OriginalTensor` is one that refuses the cast: a weight that is about to be quantized must keep the
precision it was stored in, or the 4-bit bytes would depend on the compute dtype of the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a known dtype whose values are produced by `read()`; its shape where the source says."""

    read: Callable[[], Tensor]
    dtype: torch.dtype
    shape: tuple[int, ...] | None = None

    def __getitem__(self, index: object) -> Tensor:
        return self.read()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@dataclass(frozen=True)
class OriginalTensor:
    """A lazy tensor that moves to a device but keeps its stored dtype."""

    source: LazyTensor

    def __getitem__(self, index: object) -> OriginalTensor:
        return self

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> OriginalTensor:
        if device is None or torch.device(device).type == "cpu":
            return self
        moved = self.source.read().to(device)
        return OriginalTensor(LazyTensor(lambda: moved, moved.dtype))

    def is_floating_point(self) -> bool:
        return True

    def read(self) -> Tensor:
        return self.source.read()
