"""Scores that look for text in an answer."""

from __future__ import annotations

import re

from fourbit.evaluate.scores import exact_match


def contains(answer: str, reference: str, casefold: bool = False) -> bool:
    """Whether the reference, without the white space around it, stands anywhere in the answer."""
    if casefold:
        answer, reference = answer.casefold(), reference.casefold()
    return reference.strip() in answer


def regex(answer: str, reference: str, pattern: re.Pattern[str], casefold: bool = False) -> bool:
    """Whether the pattern finds what it should, by its first match anywhere in the answer.

    A pattern without a group is right if it matches at all. With a group it extracts: the text of the
    first group must equal that of the reference, or the whole reference where the pattern does not match
    there. White space around both does not count.
    """
    found = pattern.search(answer)
    if found is None:
        return False
    if not pattern.groups:
        return True
    wanted = pattern.search(reference)
    return exact_match(found[1] or "", (wanted[1] or "") if wanted else reference, casefold)
