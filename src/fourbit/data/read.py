"""Files to rows, whatever they are: one reader per suffix, one `Row` per record.

Every file is read whole and every row's columns are checked here, before a model is loaded, so that a
mistake in the last line costs seconds and not minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fourbit.config import DataSettings
from fourbit.data.forms import form_of
from fourbit.data.lines import json_lines, json_list, whole_text
from fourbit.data.row import Row, blank_row
from fourbit.data.tables import datasets_folder, delimited, parquet
from fourbit.errors import DataError, nearest

__all__ = ["READERS", "Row", "read_rows"]

Reader = Callable[[Path], Iterator[Row]]

READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".json": json_list,
    ".csv": lambda path: delimited(path, ","),
    ".tsv": lambda path: delimited(path, "\t"),
    ".parquet": parquet,
    ".txt": whole_text,
    ".md": whole_text,
}


def read_rows(paths: Sequence[str | Path], settings: DataSettings) -> list[Row]:
    """All rows of all files, in the order given.

    A path is a file with one of the suffixes of `READERS` or a folder written by
    `datasets.Dataset.save_to_disk`. A `.txt` or `.md` file is one row with the column `text`.

    Raises DataError, naming file and line: missing or empty file, empty row (unless data.allow names it: it
    then comes back without fields), malformed row, a row that is not an object, columns of which no form can
    be made under `settings`.
    """
    rows: list[Row] = []
    for path in map(Path, paths):
        before = len(rows)
        rows.extend(_reader(path)(path))
        if len(rows) == before:
            raise DataError(f"{path}: holds no rows; give a file with at least one")
    if not rows:
        raise DataError("no data files were given; set data.train to a file or a list of files")
    for row in rows:
        if row.fields:
            form_of(row, settings)
        elif "empty" not in settings.allow:
            raise blank_row(row)
    return rows


def _reader(path: Path) -> Reader:
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_dir():
        return datasets_folder
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot read files of this kind; use one of {' '.join(READERS)} or a `datasets` folder"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; give a file with at least one row")
    return reader


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file, and no folder {path.parent}; check the path"
    hint = nearest(path.name, sorted(os.listdir(path.parent)))
    return f"{path}: no such file{hint}; check the path"
