"""CSV and TSV with the standard library; Parquet and `datasets` folders with the packages that own them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fourbit.data.packed import ALWAYS_READ, LARGEST_RATIO, Member
from fourbit.data.row import Row
from fourbit.errors import DataError
from fourbit.limits import parse_json

_ROWS_AT_ONCE = 1024
#: What a row takes in memory though it holds nothing: columns of nulls take no bytes in a file.
_ROW_BYTES = 100
#: What a value in a column takes at least, though it is null.
_VALUE_BYTES = 8


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
        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path) as file:
            batch = _batch_size(file.metadata, path, size)
            yield from _numbered(file.iter_batches(batch_size=batch), path, size)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes pyarrow raise every class there is
        reason = _first_line(error)
        raise DataError(f"{path}: not a readable Parquet file ({reason}); write it again") from None


def datasets_folder(path: Path) -> Iterator[Row]:
    """A folder written by `save_to_disk`; of several splits the path must name one."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: reading this folder needs datasets; `pip install datasets`") from None
    try:
        size = sum(_inside(path, file) for file in _named_files(path))
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            names = sorted(loaded)
            if len(names) != 1:
                listed = ", ".join(names)
                raise DataError(f"{path}: holds the splits {listed}; name one, such as {path / names[0]}")
            loaded = loaded[names[0]]
        # The reader of Arrow files believes the offsets in them.
        for part in (loaded.data, loaded._indices):
            if part is not None:
                part.table.validate(full=True)
        # As Arrow: `datasets` itself would open the files and addresses that a column of images names.
        plain = loaded.with_format("arrow")
        yield from _numbered(_batches(plain), path, size)
    except DataError:
        raise
    except Exception as error:  # a damaged folder makes datasets and pyarrow raise every class there is
        reason = _first_line(error)
        raise DataError(f"{path}: not a readable `datasets` folder ({reason}); save it again") from None


def _named_files(path: Path) -> Iterator[Path]:
    """The files of rows that a `datasets` folder, or each split in it, says it has."""
    folders = [path]
    if (path / "dataset_dict.json").exists():
        splits = parse_json((path / "dataset_dict.json").read_bytes())["splits"]
        folders = [path / split for split in splits]
    for folder in folders:
        state = parse_json((folder / "state.json").read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
        names += [entry["filename"] for entry in state.get("_indices_data_files") or []]
        yield from (folder / name for name in names)


def _inside(path: Path, file: Path) -> int:
    """The size of a file; raises DataError if it lies outside the folder."""
    if not file.resolve().is_relative_to(path.resolve()):
        raise DataError(f"{path}: names a file outside the folder ({file}); save it again")
    return file.stat().st_size


def _batch_size(metadata: Any, path: Path, packed: int) -> int:
    """Rows to read at once: each may be as long as its row group, whose values a file stores but once.

    Raises DataError for more values than may be read: a row can hold all of them, and none takes a byte.
    """
    limit = _limit(packed)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    values = sum(group.column(c).num_values for group in groups for c in range(group.num_columns))
    if values * _VALUE_BYTES > limit:
        raise _too_large(path, limit)
    longest = max((group.total_byte_size for group in groups), default=0)
    return max(1, min(_ROWS_AT_ONCE, limit // max(1, longest)))


def _batches(dataset: Any) -> Iterator[Any]:
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        yield dataset[start : start + _ROWS_AT_ONCE]


def _numbered(batches: Iterable[Any], path: Path, packed: int) -> Iterator[Row]:
    """The rows of Arrow batches, up to the limit that the size of their file sets."""
    limit = _limit(packed)
    number = size = 0
    for batch in batches:
        size += sum(map(_bytes, batch.schema.names, batch.columns)) + _ROW_BYTES * batch.num_rows
        if size > limit:
            raise _too_large(path, limit)
        for fields in batch.to_pylist():
            number += 1
            blank = all(value is None or value == "" for value in fields.values())
            yield Row({} if blank else fields, str(path), number)


def _too_large(path: Path, limit: int) -> DataError:
    return DataError(
        f"{path}: grows to more than {limit >> 20:,} MiB when unpacked, over {LARGEST_RATIO} times its size; "
        "write it as .jsonl if that is meant"
    )


def _limit(packed: int) -> int:
    return max(ALWAYS_READ, LARGEST_RATIO * packed)


def _bytes(name: str, column: Any) -> int:
    """What a column takes once each row has a value of its own."""
    import pyarrow.compute

    kind = column.type
    if str(kind).startswith("dictionary<") and str(kind.value_type) in ("string", "large_string"):
        chunks = getattr(column, "chunks", [column])
        lengths = (pyarrow.compute.binary_length(c.dictionary).take(c.indices) for c in chunks)
        return sum(pyarrow.compute.sum(length).as_py() or 0 for length in lengths)
    if _shares(kind):
        raise ValueError(f"column '{name}' is {kind}, whose rows can share values")
    return int(column.nbytes)


def _shares(kind: Any) -> bool:
    """Whether values of an Arrow type can stand for far more bytes than they hold."""
    kind = getattr(kind, "storage_type", kind)
    head = str(kind).partition("<")[0]
    if head == "dictionary" or head == "run_end_encoded" or head.endswith("_view"):
        return True
    return any(_shares(kind.field(index).type) for index in range(kind.num_fields))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
