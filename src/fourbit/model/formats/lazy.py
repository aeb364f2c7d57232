"""Tensors that are read when transformers asks for them, so that a load never holds two of them.

`from_pretrained(state_dict=...)` takes each entry, evaluates `entry[...]`, casts it to the model's
dtype, and assigns or quantizes it before it takes the next. `LazyTensor` is such an entry.
`OriginalTensor` is one that refuses the cast: a weight that is about to be quantized must keep the
precision it was stored in, or the 4-bit bytes would depend on the compute dtype of the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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
class LazyStack(LazyTensor):
    """A stack of matrices, a mixture's experts, that can be read one by one.

    matrix      reads one, as [out, in]
    transposed  the stack has them as [in, out]
    sources     for each matrix the names of the tensors that it is stored as, its rows in turn; none for a
                stack that is stored whole
    heights     rows of each of those tensors
    """

    matrix: Callable[[int], Tensor] = field(kw_only=True)
    transposed: bool = field(kw_only=True, default=False)
    sources: tuple[tuple[str, ...], ...] = field(kw_only=True, default=())
    heights: tuple[int, ...] = field(kw_only=True, default=())

    @classmethod
    def of(
        cls,
        matrix: Callable[[int], Tensor],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        transposed: bool = False,
        sources: tuple[tuple[str, ...], ...] = (),
        heights: tuple[int, ...] = (),
    ) -> LazyStack:
        """A stack of the given shape that reads its matrices when it is read itself."""

        def read() -> Tensor:
            whole = torch.empty(shape, dtype=dtype)
            for number, place in enumerate(whole):
                part = matrix(number)
                place.copy_(part.t() if transposed else part)
            return whole

        return cls(read, dtype, shape, matrix=matrix, transposed=transposed, sources=sources, heights=heights)

    def changed(self, change: Callable[[int, Tensor], Tensor], dtype: torch.dtype) -> LazyStack:
        """The stack with each matrix changed as it is read: change(number, matrix)."""
        assert self.shape is not None
        matrix = self.matrix
        return LazyStack.of(
            lambda number: change(number, matrix(number)),
            dtype,
            self.shape,
            self.transposed,
            self.sources,
            self.heights,
        )

    def apart(self) -> dict[str, LazyTensor]:
        """The tensors that it is stored as, by name."""
        assert self.shape is not None
        columns, kept = self.shape[2], dict[int, Tensor]()

        def part(number: int, begin: int, height: int) -> LazyTensor:
            def read() -> Tensor:
                # A matrix's parts are read one after another; it is made once for them.
                matrix = kept[number] if number in kept else self.matrix(number)
                kept.clear()
                if begin + height < len(matrix):
                    kept[number] = matrix
                return matrix[begin : begin + height].contiguous()

            return LazyTensor(read, self.dtype, (height, columns))

        begins = [sum(self.heights[:place]) for place in range(len(self.heights))]
        return {
            name: part(number, begin, height)
            for number, names in enumerate(self.sources)
            for name, begin, height in zip(names, begins, self.heights, strict=True)
        }


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
