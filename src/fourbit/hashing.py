"""SHA-256 of files, read piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

_CHUNK = 1 << 22


def file_hash(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file's content, in hex; `advance` is called with the bytes of each piece read.

    Raises OSError where the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()
