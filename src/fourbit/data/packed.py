"""Compressed files, read in memory within limits: .gz, .zst, and .zip with any number of files in it.

What a file says of its own size is not believed: bytes are counted as they come, and a file that grows
beyond any text's share of air is refused. Nothing is written to disk, so names in an archive lead nowhere.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fourbit.errors import DataError

SUFFIXES = (".gz", ".zst", ".zip")
#: Real text shrinks to a tenth, seldom to a fiftieth; a bomb to a thousandth.
LARGEST_RATIO = 200
#: So many bytes are read whatever the ratio is: small files of equal rows shrink well.
ALWAYS_READ = 64 << 20
MOST_FILES = 10_000
_CHUNK = 1 << 20
#: Others (LZMA) take as much memory as the file tells them to.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Member:
    """A file that was unpacked; it stands where readers expect a path."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def read_bytes(self) -> bytes:
        return self.content

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        binary = io.BytesIO(self.content)
        return binary if mode == "rb" else io.TextIOWrapper(binary, encoding=encoding, newline=newline)


def unpack(path: Path) -> Iterator[Member]:
    """The files in a compressed file; raises DataError for damage, encryption, and what grows too far."""
    try:
        if path.suffix.lower() == ".zip":
            yield from _unzip(path)
        else:
            with path.open("rb") as raw, _stream(path, raw) as file:
                content = _read(file, path.stat().st_size, str(path))
            yield Member(str(path.with_suffix("")), content)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes unpackers raise every class there is
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{path}: cannot be unpacked ({reason}); write it again") from None


def _stream(path: Path, raw: IO[bytes]) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading .zst needs pyarrow; `pip install pyarrow`") from None
    return pyarrow.CompressedInputStream(raw, "zstd")


def _unzip(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(entries) > MOST_FILES:
            raise DataError(f"{path}: holds more than {MOST_FILES:,} files; unpack it and name them")
        left = max(ALWAYS_READ, LARGEST_RATIO * path.stat().st_size)
        for entry in sorted(entries, key=lambda entry: entry.filename):
            name = f"{path}/{entry.filename}"
            if entry.flag_bits & 1:
                raise DataError(f"{name}: is encrypted; unpack it first")
            if entry.compress_type not in _METHODS:
                raise DataError(f"{name}: is packed by an unusual method; unpack it first")
            with archive.open(entry) as file:
                content = _read(file, 0, name, left)
            left -= len(content)
            yield Member(name, content)


def _read(file: IO[bytes], packed: int, name: str, limit: int | None = None) -> bytes:
    """All bytes of a stream, up to the limit that its packed size sets."""
    limit = max(ALWAYS_READ, LARGEST_RATIO * packed) if limit is None else limit
    parts, size = [], 0
    while chunk := file.read(_CHUNK):
        size += len(chunk)
        if size > limit:
            raise DataError(
                f"{name}: grows to more than {limit >> 20:,} MiB when unpacked, "
                f"over {LARGEST_RATIO} times its size; unpack it yourself if that is meant"
            )
        parts.append(chunk)
    return b"".join(parts)
