"""Files whose bytes are used where they lie: mapped into memory, read ahead, and let go.

The mapping is private: nothing that is done to a tensor reaches the file. Whoever changes or cuts the file
meanwhile changes the tensors, or ends the process.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fourbit.errors import ModelError

#: Bytes read at once while reading ahead.
_PIECE = 4 << 20


class MappedFile:
    """A file in the address space of this process; only what is touched takes memory.

    Raises ModelError for a file that cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be mapped into memory ({error})") from None
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._piece = memoryview(bytearray(min(_PIECE, len(self._map))))

    def tensor(self, begin: int, end: int) -> Tensor:
        """uint8 [end - begin]: the file's bytes from begin to end."""
        return self._bytes[begin:end]

    def span(self, tensor: Tensor) -> Span | None:
        """Where in the file a tensor's bytes lie; None if they are elsewhere."""
        begin = tensor.data_ptr() - self._bytes.data_ptr()
        inside = begin >= 0 and begin + tensor.nbytes <= len(self._map)
        return Span(self, begin, begin + tensor.nbytes) if inside and tensor.nbytes else None

    def read(self, begin: int, end: int) -> None:
        """Have the system read these bytes into its cache, so that touching them waits for no disk.

        For one thread at a time; others run meanwhile. Raises ModelError where the disk or the file fails.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(begin)
                while begin < end:
                    count = file.readinto(self._piece[: min(len(self._piece), end - begin)])
                    if not count:
                        raise OSError(f"it ends at byte {begin:,}")
                    begin += count
        except OSError as error:
            raise ModelError(f"{self.path}: changed or damaged while in use ({error})") from None

    def release(self, begin: int, end: int) -> None:
        """Let go of the memory of these bytes' pages, which come back when they are touched again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, min(end, len(self._map)) - start)


@dataclass(frozen=True)
class Span:
    """Bytes of a mapped file."""

    file: MappedFile
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def read(self) -> None:
        """See `MappedFile.read`."""
        self.file.read(self.begin, self.end)

    def release(self) -> None:
        """See `MappedFile.release`."""
        self.file.release(self.begin, self.end)
