"""One process at a time writes a run folder, and only its owner may read it.

The lock is the system's (flock): it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fourbit.errors import ConfigError
from fourbit.private import owner_only

_FILE = ".lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make the folder if need be and lock it; inside, new files and folders are their owner's alone.

    A folder that was made here and stayed empty is removed again.

    Raises ConfigError when it cannot be made or another process holds it.
    """
    made: list[Path] = []
    try:
        with owner_only():
            made = _make(folder)
            descriptor = _acquire(folder)
            try:
                yield
            finally:
                (folder / _FILE).unlink(missing_ok=True)  # before the lock ends, so that it is still ours
                os.close(descriptor)
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def check_free(folder: Path) -> None:
    """Raise ConfigError if another process holds the folder; for an answer before long work, not a lock."""
    if not (folder / _FILE).exists():
        return
    os.close(_acquire(folder))


def _make(folder: Path) -> list[Path]:
    """The folders that had to be made, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made ({error.strerror}); name another run folder with --output"
        ) from None
    return missing


def _acquire(folder: Path) -> int:
    """A descriptor that holds the lock until it is closed."""
    path = folder / _FILE
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot be written to ({error.strerror}); name another run folder with --output"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            who = f"process {holder}" if holder else "another process"
            raise ConfigError(
                f"{folder}: {who} is writing this run; wait for it, stop it, or name another with --output"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(
                f"{folder}: this file system has no locks ({error.strerror}), so two runs could write here "
                "at once; put the run folder on another"
            ) from None
        if _is_still(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
            return descriptor
        os.close(descriptor)  # its holder has removed it between our opening and locking it: another try


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
