"""Files that are whole or absent: written aside, synced to the disk, renamed into place.

A name that ends in `.partial` is being written or removed and is never read; one that ends in `.old` was
moved out of the way of its successor and counts until that stands. `recover` clears up both after a crash.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fourbit.errors import TrainingError
from fourbit.hashing import file_hash

_PARTIAL, _OLD = ".partial", ".old"


def partial_of(path: Path) -> Path:
    """Where to write what will become `path`."""
    return path.with_name(path.name + _PARTIAL)


def is_settled(path: Path) -> bool:
    """Whether a name is that of something whole."""
    return path.suffix not in (_PARTIAL, _OLD)


def new_folder(path: Path) -> Path:
    """An empty folder in which to write what will become `path`."""
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text; a reader sees the old or the new one, whole."""
    partial = partial_of(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def settle(path: Path) -> None:
    """Make the folder written at `partial_of(path)` the one at `path`, replacing the one there."""
    partial, old = partial_of(path), path.with_name(path.name + _OLD)
    _sync_tree(partial)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():  # a rename cannot replace a folder that holds files
        os.replace(path, old)
    os.replace(partial, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle_files(path: Path, last: str) -> None:
    """Like `settle`, but the folder is never away: its files are replaced one by one, `last` after the rest.

    For folders of which one file says everything and the others never change.
    """
    if not path.exists():
        settle(path)
        return
    partial = partial_of(path)
    _sync_tree(partial)
    for file in sorted(partial.iterdir(), key=lambda file: (file.name == last, file.name)):
        os.replace(file, path / file.name)
    _sync(path)
    partial.rmdir()


def remove(path: Path) -> None:
    """Remove a folder; nobody sees a half of it."""
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    os.replace(path, partial)
    shutil.rmtree(partial, ignore_errors=True)


def recover(path: Path) -> None:
    """Clear up after a write to `path` that a crash cut off: a half goes, what was moved away comes back."""
    partial, old = partial_of(path), path.with_name(path.name + _OLD)
    if old.is_dir():
        if path.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, path)
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


def settled_names(folder: Path) -> set[str]:
    """Names in a folder, without the endings that unfinished writes have."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return {name.removesuffix(_PARTIAL).removesuffix(_OLD) for name in names}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its relative path."""
    return {
        file.relative_to(folder).as_posix(): file_hash(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def forget(folder: Path) -> None:
    """Let the system drop its copies of a folder's files, so that reading them asks the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextmanager
def discard_on_error(path: Path) -> Iterator[None]:
    """Whatever fails within this block, what it had written aside for `path` goes and gives its room back."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial_of(path), ignore_errors=True)
        raise


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Within this block a full or failing disk becomes one line: what could not be written, and why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise TrainingError(
            f"{what} cannot be written ({reason}); what was saved before is whole: "
            "put that right, then go on with --resume"
        ) from error


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
