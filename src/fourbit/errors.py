"""Errors that a person reads.

Every error that a user can cause is a `FourBitError`: one line that says what was wrong, where, and
what to do. The command line prints that line and exits with the code below, without a traceback; an
exception of any other class is a defect of fourbit and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

#: More of a message is left out: names in a stranger's file can be as long as the file.
_LONGEST = 1000


class FourBitError(Exception):
    """Base of every error that a user can cause or repair.

    The message is one line of at most 1,000 characters, and what could command a terminal is written as an
    escape, whatever stood in the file that it speaks of.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[: _LONGEST + 1])
        super().__init__(shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}...")


class ConfigError(FourBitError, ValueError):
    """A setting is unknown, malformed, or contradicts another."""

    exit_code = 2


class DataError(FourBitError, ValueError):
    """Training or evaluation data cannot be used; names file and row."""

    exit_code = 3


class ModelError(FourBitError, ValueError):
    """A model, checkpoint or adapter cannot be read or does not fit."""

    exit_code = 4


class QuantizationError(FourBitError, ValueError):
    """A tensor cannot be quantized or its parts disagree."""

    exit_code = 5


class TrainingError(FourBitError, RuntimeError):
    """A run cannot go on, such as three non-finite steps in a row."""

    exit_code = 6


class ExportError(FourBitError, RuntimeError):
    """A model cannot be exported, such as when the program that quantizes it is missing or fails."""

    exit_code = 8


class MemoryBudgetError(FourBitError, RuntimeError):
    """A run cannot fit into the memory there is or was asked to suffice; found before it starts."""

    exit_code = 9


class VerificationError(FourBitError, RuntimeError):
    """A merged or exported model is not what was trained."""

    exit_code = 7


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest known name, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
