"""Output that is whole or not there: written aside, renamed into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fourbit.errors import ConfigError, ModelError


def check_output(target: Path, overwrite: bool, sources: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raise ConfigError for an output that holds something, or that would replace one of its sources."""
    place = target.resolve()
    for source in sources:
        origin = Path(source).expanduser().resolve()
        if origin.exists() and (place == origin or place in origin.parents):
            raise ConfigError(f"{target}: would replace {source}, which is read; choose another output")
    if overwrite or not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target}: exists; choose another file, or --overwrite")
    if any(target.iterdir()):
        raise ConfigError(f"{target}: exists and is not empty; choose another folder, or --overwrite")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `target`. After a failure nothing of it is left.

    Raises ModelError when the disk refuses.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        yield partial
        replace(partial, target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        _remove(partial)


def replace(partial: Path, target: Path) -> None:
    """Rename into place; a rename over a full folder needs the old one out of the way first."""
    old = target.with_name(target.name + ".old")
    _remove(old)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    _remove(old)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
