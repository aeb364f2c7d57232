"""Scores by shared words, for summaries and question answering."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

#: Runs of letters and digits; of scripts that put no spaces between words, each character.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_words(text: str) -> list[str]:
    """The words that ROUGE-L compares: lower case, no stemming; as rouge-score's on ASCII text."""
    return _WORD.findall(text.lower())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, the whole text as one sequence (Lin 2004, section 3).

    With l its length: precision l / words of the answer, recall l / words of the reference.
    """
    given, wanted = rouge_words(answer), rouge_words(reference)
    return _f1(_common_subsequence(given, wanted), len(given), len(wanted))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words in common, in any order, as SQuAD scores answers (Rajpurkar et al., arXiv:1606.05250).

    Lower case, ASCII punctuation and the articles a, an, the removed, split at white space. Where one of the
    two has no words left, 1 if neither has, else 0.
    """
    given, wanted = squad_words(answer), squad_words(reference)
    if not given or not wanted:
        return float(given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    return _f1(shared, len(given), len(wanted))


def squad_words(text: str) -> list[str]:
    """The words that SQuAD's F1 compares."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(shared: int, given: int, wanted: int) -> float:
    """Harmonic mean of shared / given and shared / wanted."""
    return 2 * shared / (given + wanted) if shared else 0.0


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, one big integer a step (Hyyro 2004).

    Bit i is place i of `one`. A zero bit of `row` marks a place at which the common subsequence so far
    grows by one.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(one)) - 1
    row = every
    for word in other:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & every
    return len(one) - bin(row).count("1")
