from __future__ import annotations

import pytest

from fourbit.evaluate.metrics.structure import json_match, json_valid


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": [1, 2.5, null, true]}', True),
        (' "text"\n', True),
        ("12", True),
        ("", False),
        ("{'a': 1}", False),
        ('{"a": 1,}', False),
        ("NaN", False),
        ('{"a": -Infinity}', False),
        ('```json\n{"a": 1}\n```', False),
        ('{"a": 1} and more', False),
        ("[" * 100_000, False),
        ("9" * 5000, False),
    ],
)
def test_json_valid(text: str, valid: bool) -> None:
    assert json_valid(text) is valid


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ('{"b": [1, true], "a": 1.0}', True),
        ('{"a": 1, "b": [true, 1]}', False),
        ('{"a": true, "b": [1, true]}', False),
        ('{"a": 1, "b": [1, 1]}', False),
        ('{"a": 1, "b": [1, true], "c": null}', False),
        ('{"a": 1, "b": [1]}', False),
        ('{"a": 1', False),
    ],
)
def test_json_match(answer: str, same: bool) -> None:
    assert json_match(answer, '{"a": 1, "b": [1, true]}') is same


def test_a_reference_that_is_not_json() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        json_match("{}", "{")
