"""Intervals and tests against scipy, which the project has for tests only."""

from __future__ import annotations

import random

import pytest
from scipy import stats

from fourbit.compare.statistics import holm, mcnemar, mean_interval, paired_t, t_probability, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30, 31])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, -2.5, 4.3, 40.0])
def test_student_t(t: float, degrees: int) -> None:
    assert t_probability(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 99])
def test_student_quantile(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_paired_t(count: int) -> None:
    draw = random.Random(count)
    first = [draw.gauss(1.0, 0.1) for _ in range(count)]
    second = [value + draw.gauss(0.02, 0.05) for value in first]
    mean, p = paired_t(first, second)
    expected = stats.ttest_rel(first, second)
    assert p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (mean.low, mean.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)


def test_one_pair_is_no_test_and_one_value_no_interval() -> None:
    mean, p = paired_t([1.0], [0.5])
    assert (mean.value, mean.low, mean.high, p) == (0.5, None, None, None)
    assert mean_interval([2.0]).low is None


def test_equal_differences() -> None:
    assert paired_t([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])[1] == 1.0
    assert paired_t([2.0, 3.0], [1.0, 2.0])[1] == 0.0


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (3, 7), (10, 10), (40, 12), (900, 1100)])
def test_mcnemar(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
