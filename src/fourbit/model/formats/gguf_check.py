"""What a GGUF file says of itself, checked against its size before anything believes it.

gguf's own reader trusts every count: it builds one object per array item that the file claims (a
truncated file that claims 2^60 never ends), cuts what lies beyond the end of the file short without a
word, and lets a tensor's offset wrap around. Here the header is walked once, nothing is kept but names
and places, and every length must fit into what is left of the file.

    "GGUF", version u32, tensors u64, pairs u64
    pair     key, type u32, value (array: item type u32, count u64, items)
    tensor   name, dimensions u32, that many u64 sizes, type u32, offset u64 into the data
    data     from the next multiple of general.alignment (32)

Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

from fourbit.errors import ModelError

#: A value by its type; 8 is text, 9 an array.
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES = {kind: struct.calcsize(f"<{form}") for kind, form in _FORMS.items()}
_UINT32, _TEXT, _ARRAY = 4, 8, 9
#: Values of all metadata together, arrays item by item: the reader takes some 250 bytes for each. The
#: largest vocabularies with scores, types and merges have one and a half million.
_MOST_ITEMS = 4 << 20
_MOST_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS


def check_gguf(file: Path) -> tuple[dict[str, float], int]:
    """The numbers of the metadata, lists of one among them, and how many tensors there are.

    Raises ModelError, naming the place, unless everything that the header claims lies in the file.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(file, data).check()
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: cannot be read as GGUF ({error}); is the file complete?") from None


class _Header:
    """A walk through a header; `at` is where it stands, `what` is what it reads."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        from gguf.constants import GGML_QUANT_SIZES

        self.file, self.data = file, data
        self.at, self.what = 0, "the header"
        self.items, self.alignment = 0, 32
        self.numbers: dict[str, float] = {}
        # Values and bytes of a block by type of tensor.
        self.blocks: dict[int, tuple[int, int]] = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}

    def check(self) -> tuple[dict[str, float], int]:
        magic, version = self._take(4), self._number("<I")
        if magic != b"GGUF":
            raise self._error("it does not begin with 'GGUF'")
        if version not in (2, 3):
            known = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise self._error(f"it is {known}; version 2 or 3, little-endian, is read")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        self._names(pairs, "metadata", self._pair)
        places: list[tuple[int, int, str]] = []
        self._names(tensors, "tensor", lambda name: places.append(self._tensor(name)))
        self._check_places(places)
        return self.numbers, tensors

    def _names(self, count: int, kind: str, read: Callable[[str], None]) -> None:
        """`count` entries, each of which begins with a name that no other has."""
        seen: set[str] = set()
        for number in range(count):
            self.what = f"{kind} entry {number}"
            name = self._name()
            if name in seen:
                raise self._error(f"the name '{name}' stands twice")
            seen.add(name)
            self.what = f"{kind} '{name}'"
            read(name)

    def _pair(self, key: str) -> None:
        kind, count = self._number("<I"), 1
        if kind == _ARRAY:
            kind, count = self._number("<I"), self._number("<Q")
        if kind != _TEXT and kind not in _FORMS:
            raise self._error(f"type {kind} is not known, or not inside an array")
        self._check_left(self.at, count * _SIZES.get(kind, 8))
        self.items += count
        if self.items > _MOST_ITEMS:
            raise self._error(f"the metadata holds more than {_MOST_ITEMS:,} items")
        if kind == _TEXT:
            for _ in range(count):
                self._skip(self._number("<Q"))
            return
        start = self.at
        self._skip(count * _SIZES[kind])
        if count == 1:
            (self.numbers[key],) = struct.unpack_from(f"<{_FORMS[kind]}", self.data, start)
        if key == "general.alignment":
            self._set_alignment(kind, self.numbers.get(key, 0))

    def _set_alignment(self, kind: int, number: float) -> None:
        if kind != _UINT32 or int(number).bit_count() != 1 or number > 1 << 20:
            raise self._error(f"{number} is not a power of two up to 2^20")
        self.alignment = int(number)

    def _tensor(self, name: str) -> tuple[int, int, str]:
        """Where the data of a tensor begins and ends, from the beginning of all data."""
        dimensions = self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._error(f"has {dimensions} dimensions, more than {_MOST_DIMENSIONS}")
        shape = [self._number("<Q") for _ in range(dimensions)]
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in self.blocks:
            raise self._error(f"type {kind} is not known")
        block, size = self.blocks[kind]
        if prod(shape) == 0:
            raise self._error(f"has the shape {shape}")
        if shape and shape[0] % block:
            raise self._error(f"rows of {shape[0]} are no whole blocks of {block}")
        if offset % self.alignment:
            raise self._error(f"offset {offset} is not a multiple of {self.alignment}")
        return offset, offset + prod(shape) // block * size, name

    def _check_places(self, places: list[tuple[int, int, str]]) -> None:
        start = -(-self.at // self.alignment) * self.alignment
        before = (0, 0, "")
        for place in sorted(places):
            self.what = f"tensor '{place[2]}'"
            self._check_left(start + place[0], place[1] - place[0])
            if place[0] < before[1]:
                raise self._error(f"overlaps '{before[2]}'")
            before = place

    def _name(self) -> str:
        try:
            return self._take(self._number("<Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error("the name is not UTF-8") from None

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _take(self, size: int) -> bytes:
        self._skip(size)
        return self.data[self.at - size : self.at]

    def _skip(self, size: int) -> None:
        self._check_left(self.at, size)
        self.at += size

    def _check_left(self, place: int, size: int) -> None:
        if place + size > len(self.data):
            raise self._error(
                f"it claims {size:,} bytes at {place:,} and the file ends at {len(self.data):,}"
            )

    def _error(self, reason: str) -> ModelError:
        return ModelError(
            f"{self.file}: cannot be read as GGUF ({self.what}: {reason}); is the file complete?"
        )
