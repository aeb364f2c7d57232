"""Hashes by which equal rows are found without keeping or showing their text."""

from __future__ import annotations

import re
from hashlib import blake2b

#: (of the text as it is, of the text without case, white space and punctuation), 64 bits each: among ten
#: million rows two different ones share a hash once in 300,000 times.
Fingerprint = tuple[int, int]

_BETWEEN_WORDS = re.compile(r"[\W_]+")


def fingerprint(text: str) -> Fingerprint:
    """The hashes of a row's text."""
    return _hash(text), _hash(_BETWEEN_WORDS.sub(" ", text.casefold()).strip())


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
