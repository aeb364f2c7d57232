from __future__ import annotations

import re

from fourbit.evaluate.metrics.text import contains, regex


def test_contains() -> None:
    assert contains("It is Paris, of course", " Paris\n")
    assert not contains("It is paris", "Paris")
    assert contains("IT IS PARIS", "Paris", casefold=True)


def test_a_pattern_that_must_be_found() -> None:
    pattern = re.compile(r"^Answer: \d+$", re.MULTILINE)
    assert regex("I think.\nAnswer: 7\n", "whatever", pattern)
    assert not regex("Answer: seven", "whatever", pattern)


def test_a_pattern_that_extracts() -> None:
    pattern = re.compile(r"answer is \(?([A-D])\)?|never(x)")
    assert regex("So the answer is (B).", "B", pattern)
    assert regex("So the answer is (B).", "the answer is B because", pattern)
    assert not regex("So the answer is (B).", "C", pattern)
    assert not regex("B", "B", pattern)
    assert regex("the answer is B", "b", pattern, casefold=True)
    assert not regex("neverx", "B", pattern)  # the first group took no part
