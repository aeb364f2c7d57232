"""What a check returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One line: `name` for people and machines, `text` for people, `value` (JSON-able) for machines."""

    name: str
    text: str
    value: object


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do about it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Finding:
    """The result of one check, or of all."""

    facts: tuple[Fact, ...] = ()
    problems: tuple[Problem, ...] = ()
