from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fourbit.evaluate.intervals import (
    difference_interval,
    loss_interval,
    mcnemar,
    mean_interval,
    paired_interval,
    stratified_difference,
    stratified_interval,
)
from fourbit.evaluate.scores import Accuracy


def pairs(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Right or wrong before and after, by how often each pair occurs."""
    first = [True] * (both + lost) + [False] * (gained + neither)
    second = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return first, second


def test_the_published_example() -> None:
    """Fagerland, Lydersen, Laake (Stat. Med. 33, 2014): hyper-responsiveness around a transplantation.

    1, 1, 7 and 12 of 21 children; Newcombe's interval of the difference, there before minus after, is
    -0.507 to -0.026 and the exact McNemar p 0.070.
    """
    found = difference_interval(*pairs(1, 1, 7, 12))
    assert found.value == pytest.approx(6 / 21)
    assert (found.low, found.high) == (pytest.approx(0.026, abs=5e-4), pytest.approx(0.507, abs=5e-4))
    assert found.p == pytest.approx(0.0703, abs=5e-5)
    assert found.clear


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_binomial_test(lost: int, gained: int) -> None:
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(*pairs(3, lost, gained, 4)) == pytest.approx(expected)


def test_many_flips() -> None:
    assert mcnemar(*pairs(0, 2000, 2000, 0)) == 1.0
    assert 0 <= mcnemar(*pairs(0, 0, 3000, 0)) < 1e-300


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_a_difference_turns_around(marks: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in marks], [b for _, b in marks]
    there, back = difference_interval(first, second), difference_interval(second, first)
    assert -1 <= there.low <= there.value <= there.high <= 1
    assert there.low == pytest.approx(-back.high, abs=1e-12)
    assert there.p == back.p


def test_four_equal_rows_are_no_proof_of_equality() -> None:
    same = difference_interval([True] * 4, [True] * 4)
    assert (same.value, same.p, same.clear) == (0.0, 1.0, False)
    assert same.low < -0.3 < 0.3 < same.high


def test_coverage() -> None:
    """The 95 % intervals hold the truth in about 95 % of samples."""
    draw = np.random.default_rng(1)
    inside = {"pairs": 0, "mean": 0, "subjects": 0}
    for _ in range(200):
        first = draw.random(60) < 0.6
        second = np.where(draw.random(60) < 0.3, draw.random(60) < 0.5, first)
        inside["pairs"] += within(difference_interval(first.tolist(), second.tolist()), 0.3 * (0.5 - 0.6))
        inside["mean"] += within(mean_interval(draw.beta(2, 3, size=60).tolist()), 0.4)
        groups = [Accuracy(int(draw.binomial(25, p)), 25) for p in (0.3, 0.5, 0.8)]
        inside["subjects"] += within(stratified_interval(groups), (0.3 + 0.5 + 0.8) / 3)
    assert all(0.9 * 200 <= count <= 0.99 * 200 for count in inside.values()), inside


def within(found: object, truth: float) -> bool:
    return found.low <= truth <= found.high  # type: ignore[attr-defined]


def test_mean_of_few() -> None:
    known = mean_interval([0.0, 0.5, 1.0, 0.5])
    assert known.value == 0.5
    assert known == mean_interval([0.0, 0.5, 1.0, 0.5])
    assert 0.1 < known.low < 0.5 < known.high < 0.9
    assert mean_interval([]).count == 0


def test_rows_that_are_all_the_same_are_no_certainty() -> None:
    perfect = mean_interval([1.0] * 12)
    assert (perfect.low, perfect.high) == (Accuracy(12, 12).low, 1.0)
    assert mean_interval([0.3]).low < 0.1 < 0.7 < mean_interval([0.3]).high
    same = paired_interval([0.5] * 12, [0.5] * 12)
    assert (same.value, same.clear) == (0.0, False)
    assert same.low == -same.high < -0.4


def test_subjects_weigh_the_same() -> None:
    found = stratified_interval([Accuracy(1, 2), Accuracy(100, 100), Accuracy(0, 1), Accuracy(0, 0)])
    assert (found.value, found.count) == (pytest.approx(0.5), 103)
    # Only the first adds variance: 0.5 * 0.5 / 1, over three squared.
    assert found.high - found.value == pytest.approx(1.959964 * 0.5 / 3, abs=1e-6)


def test_subjects_of_two_models() -> None:
    groups = [([True, False], [True, True]), ([False] * 4, [False] * 4), ([True], [False])]
    found = stratified_difference(groups)
    assert found.value == pytest.approx((0.5 + 0 - 1) / 3)
    # Only the first varies: differences 0 and 1, variance 1/2, of two rows; over three squared.
    assert found.high - found.value == pytest.approx(1.959964 * 0.5 / 3, abs=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_losses_are_weighted_by_token() -> None:
    before, after, tokens = [4.0, 10.0, 3.0, 8.0], [2.0, 8.0, 3.0, 5.0], [2, 6, 3, 4]
    found = loss_interval(before, after, tokens)
    assert found.value == pytest.approx(-7 / 15)
    assert found.low < found.value < found.high <= 0
    assert (found.p, found.method) == (None, "bootstrap")
    assert loss_interval([0.5], [0.7], [1]).high == float("inf")


def test_paired_means() -> None:
    """A shift of most rows is clear, though the rows themselves differ much more."""
    draw = np.random.default_rng(2)
    first = draw.random(40) * 0.8
    second = first + np.where(draw.random(40) < 0.7, 0.1, 0.0)
    found = paired_interval(first.tolist(), second.tolist())
    assert found.value == pytest.approx(float((second - first).mean()))
    assert 0.04 < found.low < found.value < found.high < 0.1
    assert found.clear
