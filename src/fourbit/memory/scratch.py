"""A file without a name for what memory does not hold: nothing of it stays, however the process ends."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from fourbit.errors import TrainingError


class ScratchFile:
    """Room on the disk, read and written at given places, also by another thread.

    folder  where it is; None: where the system keeps temporary files
    what    is kept there, and
    remedy  what makes it less, for messages

    Raises TrainingError where the disk fails or has no room.
    """

    def __init__(self, folder: Path | None, what: str, remedy: str) -> None:
        self._where = str(folder) if folder is not None else tempfile.gettempdir()
        self._what, self._remedy = what, remedy
        self._size = 0
        try:
            self._file = tempfile.TemporaryFile(dir=self._where, buffering=0)  # noqa: SIM115  # close() ends it
        except OSError as error:
            raise self._no_room(0, error) from None
        self.close: Callable[[], object] = weakref.finalize(self, self._file.close)

    def reserve(self, size: int) -> None:
        """Take so much room now, so that a full disk is told here and not in the middle of a write."""
        if size <= self._size:
            return
        try:
            _reserve(self._file.fileno(), size)
        except OSError as error:
            raise self._no_room(size, error) from None
        self._size = size

    def read(self, start: int, buffer: Tensor) -> None:
        """Fill a buffer of uint8 with what lies from byte `start` on."""
        self._move(os.preadv, start, buffer)

    def write(self, start: int, buffer: Tensor) -> None:
        """Put the bytes of a buffer of uint8 there."""
        self._move(os.pwritev, start, buffer)

    def _move(self, move: Callable[..., int], start: int, buffer: Tensor) -> None:
        view, done = buffer.numpy().data, 0
        try:
            while done < len(view):
                moved = move(self._file.fileno(), [view[done:]], start + done)
                if moved == 0:
                    raise OSError(0, "the file ends too early")
                done += moved
        except OSError as error:
            raise TrainingError(
                f"{self._where}: {self._what} cannot be read or written ({error.strerror}); what was "
                "saved before is whole: put that right, then go on with --resume"
            ) from None

    def _no_room(self, size: int, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self._where}: no room for {size / 1e6:,.0f} MB of {self._what} ({error.strerror}); free "
            f"some, or {self._remedy}"
        )


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, max(1, size))
    else:
        os.truncate(descriptor, size)
