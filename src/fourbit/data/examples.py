"""Encoded rows in compact form, in memory or in a file, so that rows may be more than memory holds.

A token takes four bytes: its id, and in the top bit whether it is trained. Where each example's tokens stand
is kept in memory, 40 bytes an example. Tokens in a file are read as they are asked for and not mapped, since
mapped pages would count as memory of this process.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, overload

import numpy as np

from fourbit.data.render import Example
from fourbit.data.row import Row
from fourbit.errors import DataError

_TRAINED = np.uint32(1 << 31)

#: Of one example: where its tokens end, its row's number among those used, the line that the row begins at,
#: its file's number, tokens before the first trained one, and how many are trained.
INDEX = np.dtype([("end", "<i8"), ("row", "<i8"), ("line", "<i8"), ("file", "<i4"), ("prompt", "<i4"),
                   ("trained", "<i8")])  # fmt: skip
_PACK = struct.Struct("<qqqiiq").pack
#: Of one used row: its number among all rows read, and the two hashes of its text.
ROWS = np.dtype([("number", "<i8"), ("text", "<u8"), ("normal", "<u8")])

Array = np.ndarray[Any, Any]


class Examples(Sequence[Example]):
    """Examples of one encoding, all of them or some, in any order; each is made as it is asked for.

    lengths  [N] tokens of each example
    trained  [N] how many of them are trained
    rows     [N] the number of the row that each was made of, among the rows used
    numbers  [N] the examples' `row`
    """

    def __init__(
        self, index: Array, files: Sequence[str], tokens: Tokens, chosen: Array | None = None,
        numbers: Array | None = None,
    ) -> None:  # fmt: skip
        self._index, self._files, self._tokens = index, files, tokens
        self._chosen = np.arange(len(index)) if chosen is None else chosen
        self.numbers = self._chosen if numbers is None else numbers
        starts = np.concatenate([np.zeros(1, dtype=np.int64), index["end"][:-1]])
        self.lengths: Array = (index["end"] - starts)[self._chosen]
        self.trained: Array = index["trained"][self._chosen]
        self.rows: Array = index["row"][self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Examples: ...
    def __getitem__(self, place: int | slice) -> Example | Examples:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        entry = self._index[self._chosen[place]]
        words = self.words(place)
        return Example(
            input_ids=(words & ~_TRAINED).tolist(),
            trained=(words >= _TRAINED).tolist(),
            row=int(self.numbers[place]),
            source=f"{self._files[entry['file']]}:{entry['line']}",
            prompt_tokens=int(entry["prompt"]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[place] for place in range(len(self)))

    def words(self, place: int) -> Array:
        """uint32 [T]: the tokens of an example as they are kept."""
        end = int(self._index["end"][self._chosen[place]])
        return self._tokens.read(end - int(self.lengths[place]), end)

    def take(self, places: Array, renumber: bool = False) -> Examples:
        """Some of these, in the order of `places`; `renumber` gives each a `row` of its own, from 0 on."""
        numbers = np.arange(len(places)) if renumber else self.numbers[places]
        return Examples(self._index, self._files, self._tokens, self._chosen[places], numbers)


class Tokens:
    """Tokens in memory, or from an open file, whose name may be gone; it is closed when nobody needs it."""

    def __init__(self, kept: Array | BinaryIO, name: str = "") -> None:
        self._kept, self._name = kept, name
        if not isinstance(kept, np.ndarray):
            weakref.finalize(self, kept.close)

    def read(self, start: int, end: int) -> Array:
        """uint32 [end - start]. Raises DataError where a file gives fewer."""
        if isinstance(self._kept, np.ndarray):
            return self._kept[start:end]
        try:
            self._kept.seek(4 * start)
            words = np.frombuffer(self._kept.read(4 * (end - start)), dtype="<u4")
        except (OSError, ValueError) as error:
            raise DataError(f"{self._name}: cannot be read ({error}); start again") from None
        if len(words) != end - start:
            raise DataError(f"{self._name}: ends too early; it was changed: start again")
        return words


class ExampleWriter:
    """Takes examples row by row, their tokens into memory or into an open binary file."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self._file = file
        self._tokens, self._index, self._rows = bytearray(), bytearray(), bytearray()
        self._files: dict[str, int] = {}
        self._end = 0

    def __len__(self) -> int:
        return len(self._index) // INDEX.itemsize

    def add(self, row: Row, number: int, examples: Sequence[Example], fingerprint: tuple[int, int]) -> None:
        """The examples of one row, its number among all rows read, and the hashes of its text."""
        count = len(self._rows) // ROWS.itemsize
        file = self._files.setdefault(row.file, len(self._files))
        for example in examples:
            words = packed_tokens(example)
            if self._file is None:
                self._tokens += words.tobytes()
            else:
                self._file.write(words.tobytes())
            self._end += len(words)
            trained = sum(example.trained)
            self._index += _PACK(self._end, count, row.line, file, example.prompt_tokens, trained)
        self._rows += struct.pack("<qQQ", number, *fingerprint)

    def arrays(self) -> tuple[Array, Array]:
        """(the index of the examples, number and hashes of the rows that are used)."""
        return np.frombuffer(bytes(self._index), INDEX), np.frombuffer(bytes(self._rows), ROWS)

    def files(self) -> list[str]:
        """The names of the files that the rows came from."""
        return list(self._files)

    def examples(self, name: str = "") -> Examples:
        """What was taken; of a file, which must be open for reading too, `name` is for messages."""
        if self._file is not None:
            self._file.flush()
        kept = np.frombuffer(bytes(self._tokens), "<u4") if self._file is None else self._file
        return Examples(self.arrays()[0], self.files(), Tokens(kept, name))


def packed_tokens(example: Example) -> Array:
    """uint32 [T]: ids, with the top bit set where a token is trained."""
    ids = np.array(example.input_ids, dtype="<u4")
    return ids | (np.array(example.trained, dtype="<u4") << np.uint32(31))


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example, read off the index where there is one."""
    if isinstance(examples, Examples):
        lengths: list[int] = examples.lengths.tolist()
        return lengths
    return [len(example.input_ids) for example in examples]


def length_of(examples: Sequence[Example], place: int) -> int:
    """Tokens of one example."""
    if isinstance(examples, Examples):
        return int(examples.lengths[place])
    return len(examples[place].input_ids)


def trained_of(examples: Sequence[Example]) -> list[int]:
    """Trained tokens of each example."""
    if isinstance(examples, Examples):
        counts: list[int] = examples.trained.tolist()
        return counts
    return [sum(example.trained) for example in examples]
