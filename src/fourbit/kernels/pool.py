"""Memory for what kernels return: taken from the system once and used again.

The C library serves torch's requests for aligned blocks badly: before glibc 2.38 a block seldom fits where
one of its size was freed, and a training step with checkpointing left holes larger than all else it needed
(docs/log.md). Steps ask for the same sizes again and again, so results of some size live in blocks that are
mapped from the system, kept when they are free, and given out again. Blocks come in few sizes, four to a
power of two; what is not written of one takes no memory. Where none is free, free ones of other sizes go back
to the system first, as far as the pool would otherwise hold more than what results ever needed at one time.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from collections import OrderedDict, deque
from math import prod
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourbit.shapes import rounded_size

#: Smaller results are torch's own: their holes are small too.
SMALLEST = 64 << 10
#: A free block may be so many times as large as what it is to hold, unless that is to stay.
_MOST = 4
_PAGE = mmap.PAGESIZE


class Pool:
    """Blocks of memory, free or behind tensors. For any number of threads.

    mapped  bytes taken from the system
    """

    def __init__(self) -> None:
        self.mapped = 0
        self._in_use = self._most_in_use = 0  # bytes
        self._lock = Lock()
        self._free: OrderedDict[int, Any] = OrderedDict()  # by number, the longest free first
        self._by_size: dict[int, list[int]] = {}  # their numbers
        self._numbers = 0
        self._returned: deque[Any] = deque()  # by whoever drops a tensor, at any moment
        self._owners: dict[int, weakref.ref[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, stays: bool = False) -> Tensor:
        """A contiguous CPU tensor, uninitialised; stays: what is kept for backward takes no larger block."""
        size = prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype, device="cpu")
        block = self.take(size, stays)
        values = np.frombuffer(block, dtype=np.uint8, count=size)
        number = id(values)

        def back(_: object) -> None:
            self._owners.pop(number, None)
            self.give_back(block)

        self._owners[number] = weakref.ref(values, back)
        return torch.from_numpy(values).view(dtype).view(shape)

    def empty_like(self, x: Tensor) -> Tensor:
        """The same in the layout that `torch.empty_like` would give."""
        layout = torch.empty_like(x, device="meta").stride()
        return self.empty((x.numel(),), x.dtype).as_strided(x.shape, layout)

    def take(self, size: int, stays: bool = False) -> Any:
        """A block that holds so many bytes; who has it gives it back."""
        with self._lock:
            return self._take(rounded_size(-(-size // _PAGE)) * _PAGE, 1 if stays else _MOST)

    def give_back(self, block: Any) -> None:
        """From now on a block is free. At any moment, even while the pool is at work."""
        self._returned.append(block)

    def release(self) -> None:
        """Give what is free back to the system."""
        with self._lock:
            self._collect()
            self._most_in_use = self._in_use
            self._unmap(self.mapped)

    def _take(self, size: int, most: int) -> Any:
        self._collect()
        block = self._free_block(size, most)
        self._in_use += size if block is None else len(block)
        self._most_in_use = max(self._most_in_use, self._in_use)
        if block is None:
            self._unmap(self.mapped + size - self._most_in_use)
            block = self._map(size)
            self.mapped += size
        return block

    def _free_block(self, size: int, most: int) -> Any:
        """The smallest free one of up to `most` times the size: short batches take the places of long."""
        bound = most * size
        while size <= bound:
            if numbers := self._by_size.get(size):
                return self._free.pop(numbers.pop())
            size = rounded_size(size // _PAGE + 1) * _PAGE
        return None

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._free[self._numbers] = block
            self._in_use -= len(block)
            self._by_size.setdefault(len(block), []).append(self._numbers)
            self._numbers += 1

    def _unmap(self, size: int) -> None:
        """At least so much of what is free, if there is so much: the longest free first."""
        while self._free and size > 0:
            number, block = self._free.popitem(last=False)
            self._by_size[len(block)].remove(number)
            size -= len(block)
            self.mapped -= len(block)
            # Unmapped as its last owner goes, which is here: a view may outlive its tensor for a moment.

    def _map(self, size: int) -> Any:
        try:
            if sys.platform == "win32":
                return mmap.mmap(-1, size)
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"there is no memory for a result of {size:,} bytes") from error


POOL = Pool()
