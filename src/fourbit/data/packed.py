"""Compressed files, unpacked as they are read: .gz, .zst, and .zip with any number of files in it.

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
    """A file inside a compressed one, to be read once; it stands where readers expect a path."""

    name: str
    stream: IO[bytes]

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def read_bytes(self) -> bytes:
        return self.stream.read()

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        return self.stream if mode == "rb" else io.TextIOWrapper(self.stream, encoding, newline=newline)


def unpack(path: Path) -> Iterator[Member]:
    """The files in a compressed file, each of which is read before the next is asked for.

    Raises DataError, also while one is read, for damage, encryption, and what grows too far.
    """
    limit = _Limit(max(ALWAYS_READ, LARGEST_RATIO * path.stat().st_size))
    try:
        if path.suffix.lower() == ".zip":
            yield from _unzip(path, limit)
        else:
            with path.open("rb") as raw, _stream(path, raw) as file:
                yield _member(str(path.with_suffix("")), str(path), path, file, limit)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes unpackers raise every class there is
        raise _damaged(path, error) from None


def _stream(path: Path, raw: IO[bytes]) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading .zst needs pyarrow; `pip install pyarrow`") from None
    return pyarrow.CompressedInputStream(raw, "zstd")


def _unzip(path: Path, limit: _Limit) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(entries) > MOST_FILES:
            raise DataError(f"{path}: holds more than {MOST_FILES:,} files; unpack it and name them")
        for entry in sorted(entries, key=lambda entry: entry.filename):
            name = f"{path}/{entry.filename}"
            if entry.flag_bits & 1:
                raise DataError(f"{name}: is encrypted; unpack it first")
            if entry.compress_type not in _METHODS:
                raise DataError(f"{name}: is packed by an unusual method; unpack it first")
            with archive.open(entry) as file:
                yield _member(name, name, path, file, limit)


def _member(name: str, packed: str, path: Path, file: Any, limit: _Limit) -> Member:
    return Member(name, io.BufferedReader(_Unpacking(packed, path, file, limit), _CHUNK))


@dataclass
class _Limit:
    """How many bytes a compressed file may grow to, all its members together, and how many it has."""

    most: int
    read: int = 0

    def add(self, count: int, name: str) -> None:
        self.read += count
        if self.read > self.most:
            raise DataError(
                f"{name}: grows to more than {self.most >> 20:,} MiB when unpacked, "
                f"over {LARGEST_RATIO} times its size; unpack it yourself if that is meant"
            )


class _Unpacking(io.RawIOBase):
    """The bytes of one member as they are asked for, counted; whatever the unpacker raises is a DataError."""

    def __init__(self, name: str, path: Path, file: Any, limit: _Limit) -> None:
        self._name, self._path, self._file, self._limit = name, path, file, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._file.read(len(buffer))
        except Exception as error:  # as in `unpack`
            raise _damaged(self._path, error) from None
        self._limit.add(len(content), self._name)
        buffer[: len(content)] = content
        return len(content)


def _damaged(path: Path, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(f"{path}: cannot be unpacked ({reason}); write it again")
