from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fourbit.evaluate.scores import Accuracy, Confusion, accuracy, confusions, exact_match, may_match


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Wilson (1927); the first as in Newcombe (1998), table I, the second by hand: z^2 / (n + z^2)
        (81, 263, 0.2553, 0.3662),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_known_intervals(right: int, count: int, low: float, high: float) -> None:
    found = Accuracy(right, count)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 5000).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_interval_is_scipys(pair: tuple[int, int]) -> None:
    found, expected = Accuracy(*pair), binomtest(*pair).proportion_ci(0.95, "wilson")
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


def test_accuracy_in_words() -> None:
    assert str(accuracy([True, True, False, True])) == "75.0% [30.1%, 95.4%] (3 of 4)"
    assert str(accuracy([])) == "no answers"
    assert math.isnan(accuracy([]).value)


def test_exact_match() -> None:
    assert exact_match(" card arrival\n", "card arrival")
    assert not exact_match("card  arrival", "card arrival")
    assert not exact_match("Card arrival", "card arrival")
    assert exact_match("STRASSE ", "Straße", casefold=True)


@given(st.text(alphabet="aB \n\tß", max_size=6), st.text(alphabet="aB \n\tß", max_size=6), st.booleans())
def test_may_match_never_gives_up_too_early(answer: str, reference: str, casefold: bool) -> None:
    if exact_match(answer, reference, casefold):
        assert all(may_match(answer[:n], reference, casefold) for n in range(len(answer) + 1))


def test_may_match() -> None:
    assert may_match(" card", "card arrival")
    assert may_match("caf\ufffd", "café")
    assert not may_match("cart", "card arrival")
    assert not may_match("card arrival at", "card arrival")


def test_confusions() -> None:
    answers = ["a", "b ", "b", "c", "b"]
    references = ["a", "a", "a", "a", "c"]
    assert confusions(answers, references) == [
        Confusion("a", "b", 2),
        Confusion("a", "c", 1),
        Confusion("c", "b", 1),
    ]
