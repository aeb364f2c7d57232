"""How sure a figure is: intervals of means, and of differences between two models on the same rows.

    Accuracy (scores.py)   Wilson          a proportion
    mean_interval          bootstrap       a mean of scores between 0 and 1
    stratified_interval    normal          a mean of proportions, such as of MMLU's subjects
    stratified_difference  normal          two of these on the same rows
    difference_interval    Newcombe        two proportions on the same rows, with McNemar's exact p
    paired_interval        bootstrap       two means of scores on the same rows
    loss_interval          bootstrap       two token-weighted losses on the same rows

All are two-sided and of 95 %. The bootstrap (Efron 1979) draws rows with replacement and takes percentiles;
its seed is fixed, so the same rows give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import Any

import numpy as np

from fourbit.evaluate.scores import Z_95, Accuracy, wilson

RESAMPLES, _SEED = 2000, 0
#: Rows drawn in one call: bounds memory at a few megabytes.
_DRAWN_AT_ONCE = 200_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value of `count` rows, bounded by low and high with 95 % confidence; method: how they were found."""

    value: float
    low: float
    high: float
    count: int
    method: str


@dataclass(frozen=True, slots=True)
class Difference:
    """value: the second model's figure minus the first's, with its 95 % interval; p: McNemar's, or None."""

    value: float
    low: float
    high: float
    p: float | None
    method: str

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside the interval: the difference is more than noise."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of scores in [0, 1].

    Where all are the same, resampling shows no spread though unseen rows may have some: then Wilson's
    interval, which is wide enough for any score in [0, 1], since none varies more than right and wrong.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return Estimate(float("nan"), 0.0, 1.0, 0, "bootstrap")
    mean = float(numbers.mean())
    if np.ptp(numbers) == 0:
        return Estimate(mean, *wilson(mean, len(numbers)), len(numbers), "bootstrap")
    return Estimate(mean, *_bootstrap(numbers, np.ones_like(numbers)), len(numbers), "bootstrap")


def stratified_interval(groups: Sequence[Accuracy]) -> Estimate:
    """Mean of the groups' accuracies, each group weighing the same whatever its size.

    The variance of the mean of G groups is sum of p (1 - p) / (n - 1) over G^2 (Cochran, Sampling Techniques,
    5.3); a group of one row adds none.
    """
    found = [group for group in groups if group.count]
    mean = sum(group.value for group in found) / len(found) if found else float("nan")
    variance = sum(group.value * (1 - group.value) / (group.count - 1) for group in found if group.count > 1)
    half = Z_95 * sqrt(variance) / len(found) if found else float("nan")
    rows = sum(group.count for group in found)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), rows, "normal")


def stratified_difference(groups: Sequence[tuple[Sequence[bool], Sequence[bool]]]) -> Difference:
    """Difference of two models' means of the groups' accuracies, on the same rows.

    groups: what the first and the second model got right in each.
    """
    changes = [np.subtract(second, first, dtype=np.float64) for first, second in groups]
    value = float(np.mean([change.mean() for change in changes]))
    variance = sum(float(change.var(ddof=1)) / len(change) for change in changes if len(change) > 1)
    half = Z_95 * sqrt(variance) / len(changes)
    return Difference(value, value - half, value + half, None, "normal")


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that two models are right equally often on the same rows (McNemar 1947).

    Only rows on which one is right and the other wrong count: under the hypothesis each is a fair coin.
    """
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    flips = gained + lost
    tail = sum(comb(flips, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**flips)


def difference_interval(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """How much more often the second model is right, with Newcombe's interval (1998, method 10).

    It combines the two Wilson intervals by the correlation phi of the pairs, and unlike the plain normal one
    holds for few rows and where the models never differ.
    """
    pairs = list(zip(first, second, strict=True))
    count = len(pairs)
    before, after = Accuracy(sum(a for a, _ in pairs), count), Accuracy(sum(b for _, b in pairs), count)
    phi = _correlation(pairs)
    down = _hypotenuse(after.value - after.low, before.high - before.value, phi)
    up = _hypotenuse(after.high - after.value, before.value - before.low, phi)
    value = after.value - before.value
    p = mcnemar(first, second)
    return Difference(value, max(-1.0, value - down), min(1.0, value + up), p, "newcombe")


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Difference of the means of two scores in [0, 1] on the same rows."""
    change = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    value = float(change.mean())
    if np.ptp(change) == 0:  # as in mean_interval; differences lie in [-1, 1]
        low, high = wilson((value + 1) / 2, len(change))
        return Difference(value, 2 * low - 1, 2 * high - 1, None, "bootstrap")
    return Difference(value, *_bootstrap(change, np.ones_like(change)), None, "bootstrap")


def loss_interval(first: Sequence[float], second: Sequence[float], tokens: Sequence[int]) -> Difference:
    """Difference of two token-weighted losses: first and second are sums over each row's tokens.

    One row gives no interval, and losses have no bound: it is then infinite.
    """
    change = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    weights = np.asarray(tokens, dtype=np.float64)
    value = float(change.sum() / weights.sum())
    if len(change) < 2:
        return Difference(value, float("-inf"), float("inf"), None, "bootstrap")
    return Difference(value, *_bootstrap(change, weights), None, "bootstrap")


def _bootstrap(sums: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> tuple[float, float]:
    """2.5 and 97.5 percentiles of sum / weight over resampled rows."""
    draw, count = np.random.default_rng(_SEED), len(sums)
    at_once = max(1, _DRAWN_AT_ONCE // count)
    found: list[np.ndarray[Any, Any]] = []
    for start in range(0, RESAMPLES, at_once):
        rows = draw.integers(count, size=(min(at_once, RESAMPLES - start), count))
        found.append(sums[rows].sum(axis=1) / weights[rows].sum(axis=1))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def _correlation(pairs: Sequence[tuple[bool, bool]]) -> float:
    """phi of the 2 x 2 table, a positive one corrected for continuity; 0 where a margin is empty."""
    both, neither = sum(a and b for a, b in pairs), sum(not a and not b for a, b in pairs)
    lost, gained = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    if not margins:
        return 0.0
    product: float = both * neither - lost * gained
    if product > 0:
        product = max(product - len(pairs) / 2, 0)
    return product / sqrt(margins)


def _hypotenuse(one: float, other: float, phi: float) -> float:
    return sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))
