"""JSON lines, JSON lists and plain text, with the line at which each record begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fourbit.data.packed import Member
from fourbit.data.row import Row, kind_of
from fourbit.errors import DataError
from fourbit.limits import check_depth, parse_json

File = Path | Member


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
    text = _decode(path.read_bytes(), str(path)).removeprefix("\ufeff")
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise DataError(
            f"{path}:1: not a list of objects; write [{{...}}, ...], or name it .jsonl if it has one per line"
        )
    position, line, counted = _skip_space(text, position + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
            check_depth(value)
        except json.JSONDecodeError as error:
            raise _malformed(path, error.lineno, f"{error.msg}, column {error.colno}") from None
        except RecursionError:
            raise _malformed(path, line, "nested too deeply") from None
        except ValueError as error:
            raise _malformed(path, line, str(error)) from None
        yield _object(value, path, line)
        position = _after_item(text, position, path)
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        raise DataError(
            f"{path}:{text.count(chr(10), 0, rest) + 1}: text after the end of the list; remove it"
        )


def whole_text(path: File) -> Iterator[Row]:
    """A whole file as one document in the column `text`."""
    text = _decode(path.read_bytes(), str(path)).removeprefix("\ufeff").replace("\r\n", "\n")
    if text.strip():
        yield Row({"text": text}, str(path), 1)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _after_item(text: str, position: int, path: File) -> int:
    """The place of the next item, or of the closing bracket; a comma stands before every further item."""
    position = _skip_space(text, position)
    mark = text[position : position + 1]
    if mark == "]":
        return position
    following = _skip_space(text, position + 1)
    if mark == "," and text[following : following + 1] not in ("]", ""):
        return following
    raise _malformed(
        path, text.count("\n", 0, position) + 1, "expected a comma and an object, or the list's end"
    )


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
        raise DataError(f"{where}: not valid UTF-8 (byte {error.start}); save the file as UTF-8") from None
