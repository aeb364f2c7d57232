"""Files to rows, whatever they are: one reader per suffix, one `Row` per record.

Every row's columns are checked here, before a model is loaded, so that a mistake in the last line costs
seconds and not minutes. Files are read piece by piece, compressed ones too, so that they may be larger than
memory; only a text, which is one row, is read whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fourbit.config import DataSettings
from fourbit.data import packed
from fourbit.data.forms import form_of
from fourbit.data.hub import PREFIX, places
from fourbit.data.lines import json_lines, json_list, whole_text
from fourbit.data.packed import Member
from fourbit.data.row import Row, blank_row
from fourbit.data.tables import datasets_folder, delimited, parquet
from fourbit.errors import DataError, nearest

__all__ = ["SUFFIXES", "Row", "iter_rows", "read_rows"]

Reader = Callable[[Path | Member], Iterator[Row]]

#: What a file of text holds, by its suffix; compressed files hold these too.
TEXT_READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".json": json_list,
    ".csv": lambda file: delimited(file, ","),
    ".tsv": lambda file: delimited(file, "\t"),
    ".txt": whole_text,
    ".md": whole_text,
}
SUFFIXES = (*TEXT_READERS, ".parquet", *packed.SUFFIXES)


def located(paths: Sequence[str | Path]) -> list[Path]:
    """The files and folders that paths, or addresses on the hub, stand for. Raises DataError."""
    return [place for path in paths for place in places(path, SUFFIXES)]


def iter_rows(
    paths: Sequence[str | Path],
    settings: DataSettings,
    *,
    check: Callable[[Row, DataSettings], object] = form_of,
) -> Iterator[Row]:
    """All rows of all files, in the order given, one by one.

    A path is a file with one of `SUFFIXES`, a folder of text, one written by `datasets.Dataset.save_to_disk`,
    or the address of a data set on the hub (`hub`). A `.txt` or `.md` file is one row with the column `text`.

    check: called with each row and the settings; raises DataError for columns that are not what is wanted,
    which by default are those of a form that can be trained on.

    Raises DataError, naming file and line: missing or empty file, empty row (unless data.allow names it: it
    then comes back without fields), malformed row, a row that is not an object, or what `check` refuses.
    """
    if not paths:
        raise DataError("no data files were given; set data.train to a file or a list of files")
    for path in located(paths):
        empty = True
        for row in _rows(path):
            empty = False
            if row.fields:
                check(row, settings)
            elif "empty" not in settings.allow:
                raise blank_row(row)
            yield row
        if empty:
            raise DataError(f"{path}: holds no rows; give a file with at least one")


def read_rows(
    paths: Sequence[str | Path],
    settings: DataSettings,
    *,
    check: Callable[[Row, DataSettings], object] = form_of,
) -> list[Row]:
    """`iter_rows`, all of them at once."""
    return list(iter_rows(paths, settings, check=check))


def _rows(path: Path) -> Iterator[Row]:
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_dir():
        return _folder(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: cannot read files of this kind; use one of {' '.join(SUFFIXES)} or a folder of "
            ".txt and .md files or of `datasets`"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; give a file with at least one row")
    if suffix in packed.SUFFIXES:
        return (row for member in packed.unpack(path) for row in _member(member))
    return parquet(path) if suffix == ".parquet" else TEXT_READERS[suffix](path)


def _member(member: Member) -> Iterator[Row]:
    reader = TEXT_READERS.get(member.suffix.lower())
    if reader is None:
        raise DataError(
            f"{member}: cannot read files of this kind inside a compressed one; "
            f"use one of {' '.join(TEXT_READERS)}, or unpack it"
        )
    return reader(member)


def _folder(path: Path) -> Iterator[Row]:
    """A folder of `datasets`, or one row for each .txt and .md file in it and below, in the order of names.

    Links to other folders are not followed.
    """
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        yield from datasets_folder(path)
        return
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(path)
        for name in names
        if Path(name).suffix.lower() in (".txt", ".md")
    ]
    if not found:
        raise DataError(
            f"{path}: a folder without .txt and .md files, and not one that `datasets` saved; "
            "name the files in it"
        )
    for file in sorted(found):
        if not file.is_file() or not file.resolve().is_relative_to(path.resolve()):
            raise DataError(
                f"{file}: not a file in this folder but a link out of it, or no file; name what is meant"
            )
        yield from whole_text(file)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        hub = f", or write {PREFIX}{path} for one on the hub" if _like_a_name(path) else ""
        return f"{path}: no such file, and no folder {path.parent}; check the path{hub}"
    hint = nearest(path.name, sorted(os.listdir(path.parent)))
    return f"{path}: no such file{hint}; check the path"


def _like_a_name(path: Path) -> bool:
    """Whether a path could be meant for OWNER/NAME."""
    return len(path.parts) == 2 and path.suffix.lower() not in SUFFIXES and not path.is_absolute()
