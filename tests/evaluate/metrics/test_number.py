from __future__ import annotations

from fractions import Fraction

import pytest

from fourbit.evaluate.metrics.number import final_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sold 48 / 2 = <<48/2=24>>24 clips in May.\n#### 72", 72),
        ("The answer is 18.", 18),
        ("$1,234,567.50 in all", Fraction(2469135, 2)),
        ("#### 1,000", 1000),
        ("it falls to -3 degrees", -3),
        ("it falls to \u22123 degrees", -3),
        ("she owes -$5", -5),
        ("she owes $-5", -5),
        ("10-15", 15),
        ("x-1", 1),
        ("(3)-4", 4),
        ("- 5 apples", 5),
        (".5 of it", Fraction(1, 2)),
        ("0.50%", Fraction(1, 2)),
        ("3/4 of the cake", Fraction(3, 4)),
        ("3/0", 3),
        ("1e3 steps", 1000),
        ("numbers 1,2,3", 3),
        ("1,2345", 2345),
        ("12345,678", 678),
        ("#### 7 or rather 8", 7),
        ("#### 7\n#### 8", 8),
        ("#### Step 3\n5 + 5 = 10", 10),
        ("####", None),
        ("", None),
        ("none at all", None),
        ("9" * 5000, Fraction(10**5000 - 1)),
    ],
)
def test_final_number(text: str, number: Fraction | int | None) -> None:
    assert final_number(text) == number


def test_same_number() -> None:
    assert same_number("That makes $18.00.", "9 + 9 = <<9+9=18>>18\n#### 18")
    assert not same_number("18 or 19", "#### 18")
    assert not same_number("no number", "no number")
    assert not same_number("1/4", "3/4")
