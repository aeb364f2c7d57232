"""The final number of an answer, for maths.

GSM8K (Cobbe et al., arXiv:2110.14168) ends its worked answers with `#### 42`; models trained otherwise end
with a sentence. So the number right after the last `####` counts, and without one (`####` also begins a
Markdown heading) the last number in the text.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

_MARK = "####"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_SIZE = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
#: A sign counts only where a number can begin, and right before it: in "10-15", "x-1" and "- 5" it is none.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\].])[-+\u2212])?[$\u20ac\u00a3\u00a5]?"
    rf"(?P<size>{_SIZE})(?P<power>[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
    rf"(?:/(?P<below>{_DIGITS})(?![/0-9]))?"
)


def final_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None if there is none.

    Thousands separators (1,234), signs, decimals, fractions (3/4), exponents (1e6) and a currency sign
    before the digits are understood. A comma that does not part thousands parts numbers.
    """
    _, mark, after = text.rpartition(_MARK)
    if mark:
        marked = _NUMBER.match(after.lstrip())
        if marked is not None:
            return _value(marked)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def same_number(answer: str, reference: str) -> bool:
    """Whether both texts have a final number and it is the same: 18, 18.00 and $18 are."""
    found = final_number(answer)
    return found is not None and found == final_number(reference)


def _value(match: re.Match[str]) -> Fraction:
    # Decimal takes digits without limit, where int refuses more than 4,300.
    number = Fraction(Decimal(match["size"].replace(",", "") + (match["power"] or "")))
    below = Fraction(Decimal(match["below"].replace(",", ""))) if match["below"] else Fraction(1)
    if below:
        number /= below
    return -number if match["sign"] in ("-", "\u2212") else number
