"""Intervals and paired tests for few seeds and many rows, exact and without scipy.

Loss: Student's t over seeds; a pair is the two arms' losses with the same seed. Score: McNemar's exact test
over rows, that is the sign test on the rows that only one arm has right. Several tests of one kind are
corrected together by Holm (1979), so that the chance of one false difference among them stays below 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

#: Tests below this, after correction, are beyond noise.
LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over `count` values with its 95 % interval, which one value does not have."""

    value: float
    low: float | None
    high: float | None
    count: int


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean and Student's t interval of independent values."""
    value, count = fmean(values), len(values)
    if count < 2:
        return Mean(value, None, None, count)
    half = t_quantile(count - 1) * stdev(values) / math.sqrt(count)
    return Mean(value, value - half, value + half, count)


def paired_t(first: Sequence[float], second: Sequence[float]) -> tuple[Mean, float | None]:
    """The mean of first - second with its interval, and the two-sided p-value; None for a single pair."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = mean_interval(differences)
    if mean.count < 2:
        return mean, None
    error = stdev(differences) / math.sqrt(mean.count)
    if error == 0:
        return mean, 1.0 if mean.value == 0 else 0.0
    return mean, t_probability(mean.value / error, mean.count - 1)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value from the numbers of rows that only one of the two has right."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    if count == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def t_probability(t: float, degrees: int) -> float:
    """P(|T| >= |t|) of Student's t with a whole number of degrees of freedom.

    The finite series in theta = atan(t / sqrt(degrees)), Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    theta = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for index in range((degrees - 1) // 2 if odd else degrees // 2):
        total += term
        k = 2 * index + (2 if odd else 1)
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)


def t_quantile(degrees: int) -> float:
    """The t with P(|T| >= t) = 5 %, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) > 0.05 else (low, middle)
    return high
