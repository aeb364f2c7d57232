from __future__ import annotations

import pytest

from fourbit.evaluate.confusion import MOST_LABELS, confusion_table, is_classification


def test_counts() -> None:
    answers = ["cat", " dog", "dog", None, "a bird", "dog\n"]
    references = ["cat", "cat", "dog", "dog ", "dog", "dog"]
    found = confusion_table(answers, references)
    assert found is not None
    assert found.labels == ("cat", "dog")
    assert found.counts == ((1, 1, 0), (0, 2, 2))


def test_labels_keep_their_order_and_references_follow() -> None:
    found = confusion_table(["no", "NO"], ["yes", "perhaps"], ["yes", "no"], casefold=True)
    assert found is not None
    assert found.labels == ("yes", "no", "perhaps")
    assert found.counts == ((0, 1, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0))


@pytest.mark.parametrize(
    ("references", "labels", "expected"),
    [
        (["a", "b"], None, False),
        (["a", "b", "a", "b"], None, True),
        (["a", "b", "a", "b", "c"], None, False),
        (["a", "b"], ["a", "b"], True),
    ],
)
def test_what_is_a_classification(references: list[str], labels: list[str] | None, expected: bool) -> None:
    assert is_classification(references, labels) is expected
    assert (confusion_table(references, references, labels) is not None) is expected


def test_too_many_labels_for_a_table() -> None:
    names = [f"label {n}" for n in range(MOST_LABELS + 1)]
    assert confusion_table(names * 2, names * 2) is None
    assert confusion_table(names[:-1] * 2, names[:-1] * 2) is not None
