from __future__ import annotations

import pytest

from fourbit.config import METRICS, EvalSettings
from fourbit.config_file import load_config
from fourbit.errors import ConfigError, DataError
from fourbit.evaluate.metrics.metric import Metric, metrics_of


def one(name: str, casefold: bool = False) -> Metric:
    pattern = "[a-z]+" if name == "regex" else None
    (metric,) = metrics_of(EvalSettings(metrics=(name,), pattern=pattern), casefold)
    return metric


def test_every_name_has_its_metric_in_the_order_asked_for() -> None:
    names = tuple(reversed(METRICS))
    assert [m.name for m in metrics_of(EvalSettings(metrics=names, pattern="x"))] == list(names)


def test_right_answers_score_one() -> None:
    for name in METRICS:
        assert one(name).score("42", "42") == (0 if name == "regex" else 1), name
    assert one("regex").score("x", "42") == 1


def test_case() -> None:
    assert one("exact_match", casefold=True).score("A", "a")
    assert one("regex", casefold=True).score("ABC", "")
    assert not one("regex").score("ABC", "")


@pytest.mark.parametrize(
    ("name", "reference", "missing"),
    [
        ("number", "none", "a number"),
        ("json_match", "{", "valid JSON"),
        ("contains", " \n", "text"),
        ("rouge_l", "?!", "words"),
    ],
)
def test_a_reference_that_nothing_can_match(name: str, reference: str, missing: str) -> None:
    with pytest.raises(DataError, match=rf"^t.csv:3: the metric {name} needs {missing}, and the reference"):
        one(name).check(reference, "t.csv:3")
    one(name).check('{"a": 1}', "t.csv:3")


def test_means() -> None:
    right = one("contains").mean([1.0, 0.0, 1.0, 1.0])
    assert (right.value, right.count, right.method) == (0.75, 4, "wilson")
    graded = one("rouge_l").mean([0.5, 0.25])
    assert (graded.value, graded.count, graded.method) == (0.375, 2, "bootstrap")


BASE = ["model.path=m", "data.train=d.csv"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.metrics=[exact_mach]", "unknown metric 'exact_mach' (did you mean 'exact_match'?)"),
        ("eval.metrics=zzz", "unknown metric 'zzz'; known are exact_match, contains, regex"),
        ("eval.metrics=[]", "name at least one metric"),
        ("eval.metrics=[number, number]", "each once, not [number, number]"),
        ("eval.metrics=regex", "pattern and the metric regex go together"),
        ("eval.pattern=abc", "pattern and the metric regex go together"),
        ("eval={metrics: regex, pattern: '('}", "eval"),
        ("eval.shots=5", "shots and shots_file go together"),
    ],
)
def test_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*BASE, override])
    assert message in str(caught.value)


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"pattern '\(' is not a regular expression: missing \)"):
        load_config(None, [*BASE, "eval.metrics=regex", "eval.pattern=("])
