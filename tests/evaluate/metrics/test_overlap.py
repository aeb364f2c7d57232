"""The figures of rouge_l are those of rouge-score 0.1.2 without stemming, the de facto reference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.evaluate.metrics.overlap import rouge_l, rouge_words, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat on the mat", "the cat was sitting on the mat", 0.7692307692307692),
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("Mat. it's x_y", "mat it s x y 3,4", 10 / 12),
        ("", "the cat", 0.0),
        ("cat", "dog", 0.0),
    ],
)
def test_rouge_l(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score, abs=1e-12)


WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


@given(WORDS, WORDS)
def test_rouge_l_is_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    longest = table[-1][-1]
    expected = 2 * longest / (len(one) + len(other)) if longest else 0.0
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)


def test_words_of_other_scripts() -> None:
    assert rouge_words("Café, STRASSE 7") == ["café", "strasse", "7"]
    assert rouge_words("北京です") == ["北", "京", "で", "す"]
    assert rouge_l("北京大学", "北京") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [  # worked by hand from the rules of SQuAD's evaluate-v1.1.py
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("in 1889, by Eiffel", "1889", 0.4),
        ("Denver Broncos won the Super Bowl", "the Denver Broncos", 4 / 7),
        ("a cat a cat", "cat", 2 / 3),
        ("Paris", "London", 0.0),
        ("the", "a", 1.0),
        ("", "Paris", 0.0),
    ],
)
def test_token_f1(answer: str, reference: str, score: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(score)
