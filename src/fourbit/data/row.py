"""One record of a data file, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fourbit.config import Problem
from fourbit.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """A record as it was read.

    fields   column name to value, as the file gives it (CSV: always text); none in a blank row
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


class RowError(DataError):
    """A row that cannot be trained; `problem` names the kind, the message file and line."""

    def __init__(self, problem: Problem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


def blank_row(row: Row) -> RowError:
    """The error for a row that holds nothing."""
    return RowError("empty", f"{row.source}: the row is empty; remove it")


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
