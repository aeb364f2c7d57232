"""CSV and TSV with the standard library; Parquet and `datasets` folders with the packages that own them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fourbit.data.packed import Member
from fourbit.data.row import Row
from fourbit.errors import DataError


def delimited(path: Path | Member, delimiter: str) -> Iterator[Row]:
    """A table with a header line; every value is text. A record may span lines inside quotes."""
    # The module's limit of 131,072 characters a cell is process-wide, and documents are longer.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield from _records(path, delimiter)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not valid UTF-8; save the file as UTF-8") from None
    finally:
        csv.field_size_limit(limit)


def _records(path: Path | Member, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        columns: list[str] | None = None
        blank: int | None = None
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}:{line}: not a valid row ({error}); repair its quotes") from None
            if record is None:
                return
            # Blank lines that end a file are harmless; one before a record is an empty row.
            if not record:
                blank = blank or line
                continue
            if blank is not None:
                yield Row({}, str(path), blank)
                blank = None
            if not any(record):
                yield Row({}, str(path), line)
                continue
            if columns is None:
                columns = _header(record, path, line)
                continue
            if len(record) != len(columns):
                raise DataError(
                    f"{path}:{line}: the row has {len(record)} values and the header {len(columns)} columns; "
                    "repair it, and quote values that hold the delimiter"
                )
            yield Row(dict(zip(columns, record, strict=True)), str(path), line)


def _header(record: list[str], path: Path | Member, line: int) -> list[str]:
    columns = [name.strip() for name in record]
    for index, name in enumerate(columns):
        if not name:
            raise DataError(f"{path}:{line}: column {index + 1} of the header has no name; name it")
        if name in columns[:index]:
            raise DataError(f"{path}:{line}: the header names the column '{name}' twice; rename one")
    return columns


def parquet(path: Path) -> Iterator[Row]:
    """A Parquet file; `line` is the record's number."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow; `pip install pyarrow`") from None
    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = _first_line(error)
        raise DataError(f"{path}: not a readable Parquet file ({reason}); write it again") from None
    yield from _numbered(records, path)


def datasets_folder(path: Path) -> Iterator[Row]:
    """A folder written by `save_to_disk`; of several splits the path must name one."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: reading this folder needs datasets; `pip install datasets`") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = _first_line(error)
        raise DataError(f"{path}: not a readable `datasets` folder ({reason}); save it again") from None
    if isinstance(loaded, datasets.DatasetDict):
        names = sorted(loaded)
        if len(names) != 1:
            listed = ", ".join(names)
            raise DataError(f"{path}: holds the splits {listed}; name one, such as {path / names[0]}")
        loaded = loaded[names[0]]
    yield from _numbered(loaded.to_list(), path)


def _numbered(records: list[dict[str, Any]], path: Path) -> Iterator[Row]:
    for number, fields in enumerate(records, start=1):
        blank = all(value is None or value == "" for value in fields.values())
        yield Row({} if blank else fields, str(path), number)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
