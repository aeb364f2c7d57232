"""One record of a data file, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """A record as it was read.

    fields   column name to value, as the file gives it (CSV: always text)
    file     the path as the user wrote it
    line     1-based line at which the record begins; in Parquet and `datasets` folders, its number
    """

    fields: dict[str, Any]
    file: str
    line: int

    @property
    def source(self) -> str:
        """`file:line`, the beginning of every message about this row."""
        return f"{self.file}:{self.line}"


def kind_of(value: object) -> str:
    """What a value is, in the words of an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return f"a {type(value).__name__}"
