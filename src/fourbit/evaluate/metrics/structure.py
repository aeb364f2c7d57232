"""Answers that should be JSON."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parse_json(text: str) -> Any:
    """The value of a JSON text (RFC 8259); raises ValueError for anything else.

    Python's reader also takes NaN and Infinity, which JSON does not have: they are refused here.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_valid(answer: str) -> bool:
    """Whether the whole answer is one JSON value; text or a code fence around it makes it invalid."""
    try:
        parse_json(answer)
    except ValueError:
        return False
    return True


def json_match(answer: str, reference: str) -> bool:
    """Whether the answer is JSON and means the same as the reference.

    The order of keys and white space do not count, 1 equals 1.0, and true is not 1. Raises ValueError if the
    reference is not JSON.
    """
    wanted = parse_json(reference)
    try:
        return _same(parse_json(answer), wanted)
    except ValueError:
        return False


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
