"""JSON lines, JSON lists and plain text, with the line at which each record begins."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fourbit.data.packed import Member
from fourbit.data.row import Row, kind_of
from fourbit.errors import DataError
from fourbit.limits import check_depth, parse_json

File = Path | Member

#: Bytes of a JSON list that are read at a time.
_PIECE = 1 << 20
_NO_SPACE = re.compile(r"[^ \t\r\n]")
_DECODER = json.JSONDecoder()
#: Where text is cut off inside a value, decoding fails so near its end: in a word or an escape.
_LONGEST_TOKEN = 16


def json_lines(path: File) -> Iterator[Row]:
    """One JSON object per line. Lines end at a newline only: JSON text may hold other separators."""
    blank: list[int] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).removesuffix(b"\n")
            # Blank lines that end a file are harmless; one before a record is an empty row.
            if not raw.strip():
                blank.append(number)
                continue
            yield from (Row({}, str(path), line) for line in blank)
            blank.clear()
            yield _object(_value(raw, path, number), path, number)


def _value(raw: bytes, path: File, number: int) -> Any:
    text = _decode(raw, f"{path}:{number}")
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise _malformed(path, number, f"{error.msg}, column {error.colno}") from None
    except ValueError as error:
        raise _malformed(path, number, str(error)) from None


def json_list(path: File) -> Iterator[Row]:
    """A JSON list of objects, read one by one so that each knows its line."""
    with path.open("rb") as file:
        text = _Text(file, path)
        if not text.mark():
            return
        if text.mark() != "[":
            raise DataError(
                f"{path}:1: not a list of objects; write [{{...}}, ...], "
                "or name it .jsonl if it has one per line"
            )
        text.skip(1)
        while text.mark() != "]":
            line = text.line
            yield _object(text.value(), path, line)
            # A comma stands before every further item.
            mark, line = text.mark(), text.line
            if mark == ",":
                text.skip(1)
            if mark != "]" and (mark != "," or text.mark() in ("]", "")):
                raise _malformed(path, line, "expected a comma and an object, or the list's end")
        text.skip(1)
        if text.mark():
            raise DataError(f"{path}:{text.line}: text after the end of the list; remove it")


class _Text:
    """JSON text that is read piece by piece: a value and what is read ahead are all that is kept of it.

    line  that of the next character, from 1
    """

    def __init__(self, file: IO[bytes], path: File) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0  # that the decoder was given
        self._text, self._at = "", 0
        self.line, self._column = 1, 0

    def mark(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            match = _NO_SPACE.search(self._text, self._at)
            self.skip((match.start() if match else len(self._text)) - self._at)
            if match:
                return match.group()
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        end = self._at + count
        if newlines := self._text.count("\n", self._at, end):
            self.line += newlines
            self._column = end - self._text.rfind("\n", self._at, end) - 1
        else:
            self._column += count
        self._at = end

    def value(self) -> Any:
        """The JSON value that begins here, and what follows is next."""
        while True:
            start = self._at
            try:
                value, end = _DECODER.raw_decode(self._text, start)
                check_depth(value)
            except json.JSONDecodeError as error:
                # What is cut off fails at its end, or where the string began that has none.
                cut = error.pos > len(self._text) - _LONGEST_TOKEN or error.msg.startswith("Unterminated")
                if cut and self._more():
                    continue
                self.skip(error.pos - start)
                raise _malformed(self._path, self.line, f"{error.msg}, column {self._column + 1}") from None
            except RecursionError:
                raise _malformed(self._path, self.line, "nested too deeply") from None
            except ValueError as error:
                raise _malformed(self._path, self.line, str(error)) from None
            self.skip(end - start)
            return value

    def _more(self) -> bool:
        """Read on, twice as much each time within one value; False at the end of the file."""
        kept = self._text[self._at :]
        raw = self._file.read(max(_PIECE, len(kept)))
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise _not_utf8(str(self._path), self._bytes - pending + error.start) from None
        self._bytes += len(raw)
        self._text, self._at = kept + text, 0
        return bool(raw)


def whole_text(path: File) -> Iterator[Row]:
    """A whole file as one document in the column `text`."""
    text = _decode(path.read_bytes(), str(path)).removeprefix("\ufeff").replace("\r\n", "\n")
    if text.strip():
        yield Row({"text": text}, str(path), 1)


def _malformed(path: File, line: int, reason: str) -> DataError:
    return DataError(f"{path}:{line}: not valid JSON ({reason}); repair the row")


def _object(value: Any, path: File, line: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}:{line}: the row is {kind_of(value)}, must be an object with named columns")
    return Row(value, str(path), line)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error.start) from None


def _not_utf8(where: str, byte: int) -> DataError:
    return DataError(f"{where}: not valid UTF-8 (byte {byte}); save the file as UTF-8")
