"""Pages: pieces of optimizer states, of which some are resident and the rest lie in the next tier.

The next tier is a file where weights are on a CPU, and pinned host memory where they are on a GPU. Which
pages are resident is decided by the budget alone: the first ones, as many as fit. A step visits pages in the
same order whatever the budget is; while one is computed on, the next is read and the one before written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fourbit.errors import TrainingError
from fourbit.memory.scratch import ScratchFile

#: Pages on their way at once: one is read, one computed on, one written.
BUFFERS = 3


class Pages:
    """Byte buffers of given sizes, all zero at first.

    sizes   bytes of each page
    device  where a page is worked on
    memory  bytes that may stay there between steps; None: all. What is not resident takes BUFFERS of the
            largest page besides, during a step.
    folder  for the file of what is not resident; None: where the system keeps temporary files
    """

    def __init__(
        self,
        sizes: Sequence[int],
        device: torch.device,
        memory: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.sizes, self._device = list(sizes), device
        self._folder = folder
        self._resident: dict[int, Tensor] = {}
        self._below: _File | _Host | None = None
        fitting = self._fitting(memory)
        if fitting < len(self.sizes):
            self._below = self._open_below()
        for page in range(fitting):
            self._resident[page] = torch.zeros(self.sizes[page], dtype=torch.uint8, device=device)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pages that are resident."""
        return sum(self.sizes[page] for page in self._resident)

    def resident(self, wanted: Collection[int]) -> dict[int, Tensor]:
        """Those of the wanted pages that are resident, in order, each with its bytes, uint8."""
        return {page: self._resident[page] for page in sorted(wanted) if page in self._resident}

    def set_memory(self, memory: int | None) -> None:
        """Move pages until the resident ones are those of a budget; not within a `sweep`."""
        fitting = self._fitting(memory)
        for page in [page for page in self._resident if page >= fitting]:
            self._below = self._below or self._open_below()
            self._below.write(page, self._resident.pop(page))
        for page in range(fitting):
            if page not in self._resident:
                assert self._below is not None
                buffer = torch.empty(self.sizes[page], dtype=torch.uint8, device=self._device)
                self._below.read(page, buffer)
                self._resident[page] = buffer
        if self._below is not None and len(self._resident) == len(self.sizes):
            self._below.close()
            self._below = None

    def sweep(self, wanted: Collection[int], write: bool) -> Iterator[tuple[int, Tensor]]:
        """The wanted pages in order, each with its bytes, uint8, valid until the next one is asked for.

        With `write`, what was changed in them is kept. Raises TrainingError where the next tier fails.
        """
        order = sorted(wanted)
        moving = [page for page in order if page not in self._resident]
        if not moving:
            yield from ((page, self._resident[page]) for page in order)
            return
        assert self._below is not None
        largest = max(self.sizes[page] for page in moving)
        buffers = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(BUFFERS)]
        reads: dict[int, Future[None]] = {}
        writes: list[Future[None]] = []
        # One thread, so that a buffer is read into only after what it held was written.
        with ThreadPoolExecutor(1, "fourbit-pages") as worker:
            below = self._below

            def view(number: int) -> Tensor:
                return buffers[number % BUFFERS][: self.sizes[moving[number]]]

            def fetch(number: int) -> None:
                if number < len(moving) and number not in reads:
                    reads[number] = worker.submit(below.read, moving[number], view(number))

            number = 0
            for page in order:
                if page in self._resident:
                    yield page, self._resident[page]
                    continue
                fetch(number)
                fetch(number + 1)
                reads.pop(number).result()
                yield page, view(number)
                if write:
                    writes.append(worker.submit(below.write, page, view(number)))
                number += 1
            for done in writes:
                done.result()

    def close(self) -> None:
        """Give everything back."""
        self._resident.clear()
        if self._below is not None:
            self._below.close()
            self._below = None

    def _fitting(self, memory: int | None) -> int:
        """How many of the first pages a budget holds."""
        if memory is None:
            return len(self.sizes)
        count = used = 0
        while count < len(self.sizes) and used + self.sizes[count] <= memory:
            used += self.sizes[count]
            count += 1
        return count

    def _open_below(self) -> _File | _Host:
        if self._device.type == "cpu":
            return _File(self.sizes, self._folder)
        return _Host(self.sizes)


class _File:
    """Pages in a file without a name."""

    def __init__(self, sizes: Sequence[int], folder: Path | None) -> None:
        self._file = ScratchFile(
            folder, "optimizer states", "let more of them stay in memory (train.optimizer_memory)"
        )
        try:
            self._file.reserve(sum(sizes))
        except TrainingError:
            self._file.close()
            raise
        self._starts = [sum(sizes[:page]) for page in range(len(sizes))]

    def read(self, page: int, buffer: Tensor) -> None:
        self._file.read(self._starts[page], buffer)

    def write(self, page: int, buffer: Tensor) -> None:
        self._file.write(self._starts[page], buffer)

    def close(self) -> None:
        self._file.close()


class _Host:
    """Pages in the host's memory, pinned so that a GPU copies them on its own."""

    def __init__(self, sizes: Sequence[int]) -> None:
        pinned = torch.cuda.is_available()
        self._pages = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]

    def read(self, page: int, buffer: Tensor) -> None:
        buffer.copy_(self._pages[page])

    def write(self, page: int, buffer: Tensor) -> None:
        self._pages[page].copy_(buffer)

    def close(self) -> None:
        self._pages.clear()
