"""Scores of answers against references: exact match, accuracy with its interval, what is taken for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

#: The normal distribution's 97.5 % quantile, for two-sided 95 % intervals.
Z_95 = 1.959963984540054


def wilson(share: float, count: int) -> tuple[float, float]:
    """Bounds of the true share, with 95 % confidence, where `share` of `count` rows were right."""
    centre = share + Z_95**2 / (2 * count)
    half = Z_95 * sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    scale = 1 + Z_95**2 / count
    return 0.0 if share == 0 else (centre - half) / scale, 1.0 if share == 1 else (centre + half) / scale


@dataclass(frozen=True, slots=True)
class Accuracy:
    """right of count answers; low and high bound the true accuracy with 95 % confidence.

    The interval is Wilson's (1927), which stays within [0, 1] and holds for few rows and for 0 or all right:

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """

    right: int
    count: int

    @property
    def value(self) -> float:
        """right / count; NaN of no answers."""
        return self.right / self.count if self.count else float("nan")

    @property
    def low(self) -> float:
        return wilson(self.value, self.count)[0]

    @property
    def high(self) -> float:
        return wilson(self.value, self.count)[1]

    def __str__(self) -> str:
        if not self.count:
            return "no answers"
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.right:,} of {self.count:,})"


def as_dict(value: Accuracy) -> dict[str, float | int]:
    """Plain values for JSON."""
    return {name: getattr(value, name) for name in ("value", "low", "high", "right", "count")}


def accuracy(right: Iterable[bool]) -> Accuracy:
    """Of a list of right and wrong."""
    marks = list(right)
    return Accuracy(sum(marks), len(marks))


def exact_match(answer: str, reference: str, casefold: bool = False) -> bool:
    """Whether they are the same but for white space around them (and, with casefold, for case)."""
    return _plain(answer, casefold) == _plain(reference, casefold)


def may_match(beginning: str, reference: str, casefold: bool = False) -> bool:
    """Whether an answer that begins so can still become an exact match.

    A beginning may end inside a character, which decodes to U+FFFD.
    """
    known = _plain(beginning.rstrip("\ufffd"), casefold)
    return _plain(reference, casefold).startswith(known)


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often `answer` was given where `reference` was right."""

    reference: str
    answer: str
    count: int


def confusions(answers: Sequence[str], references: Sequence[str], casefold: bool = False) -> list[Confusion]:
    """Wrong answers and what they were given for, the most frequent first."""
    pairs = Counter(
        (reference.strip(), answer.strip())
        for answer, reference in zip(answers, references, strict=True)
        if not exact_match(answer, reference, casefold)
    )
    by_frequency = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [Confusion(*pair, count) for pair, count in by_frequency]


def _plain(text: str, casefold: bool) -> str:
    stripped = text.strip()
    return stripped.casefold() if casefold else stripped
