"""The scores by name, and what they add up to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fourbit.config import EvalSettings
from fourbit.errors import DataError
from fourbit.evaluate.intervals import Estimate, mean_interval
from fourbit.evaluate.metrics.number import final_number, same_number
from fourbit.evaluate.metrics.overlap import rouge_l, rouge_words, token_f1
from fourbit.evaluate.metrics.structure import json_match, json_valid, parse_json
from fourbit.evaluate.metrics.text import contains, regex
from fourbit.evaluate.scores import accuracy, exact_match

Score = Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """One score of answers.

    score       of (answer, reference), from 0 to 1
    graded      whether it takes values between: its mean then has a bootstrap interval, else Wilson's
    whole       whether an answer that the length limit cut off scores 0, whatever stands in it so far
    answerable  what a reference must have, and whether it does
    """

    name: str
    score: Score
    graded: bool = False
    whole: bool = False
    answerable: tuple[str, Callable[[str], bool]] | None = None

    def check(self, reference: str, where: str) -> None:
        """Raise DataError, beginning with `where`, for a reference against which no answer could be right."""
        if self.answerable is not None and not self.answerable[1](reference):
            raise DataError(
                f"{where}: the metric {self.name} needs {self.answerable[0]}, and the reference answer has "
                "none; correct the row or choose another metric"
            )

    def mean(self, scores: Sequence[float]) -> Estimate:
        """Of all rows, with its interval."""
        if self.graded:
            return mean_interval(scores)
        found = accuracy(score == 1 for score in scores)
        return Estimate(found.value, found.low, found.high, found.count, "wilson")


def metrics_of(settings: EvalSettings, casefold: bool = False) -> list[Metric]:
    """The metrics that `eval.metrics` names, in that order; casefold: upper and lower case are the same."""
    pattern = re.compile(settings.pattern or "", re.IGNORECASE if casefold else 0)
    known = [
        Metric("exact_match", partial(exact_match, casefold=casefold), whole=True),
        Metric("contains", partial(contains, casefold=casefold), answerable=("text", _has_text)),
        Metric("regex", partial(regex, pattern=pattern, casefold=casefold)),
        Metric("number", same_number, whole=True, answerable=("a number", _has_number)),
        Metric("json_valid", lambda answer, _: json_valid(answer), whole=True),
        Metric("json_match", json_match, whole=True, answerable=("valid JSON", _is_json)),
        Metric("rouge_l", rouge_l, graded=True, answerable=("words", _has_words)),
        Metric("token_f1", token_f1, graded=True),
    ]
    by_name = {metric.name: metric for metric in known}
    return [by_name[name] for name in settings.metrics]


def _has_text(reference: str) -> bool:
    return bool(reference.strip())


def _has_number(reference: str) -> bool:
    return final_number(reference) is not None


def _is_json(reference: str) -> bool:
    try:
        parse_json(reference)
    except ValueError:
        return False
    return True


def _has_words(reference: str) -> bool:
    return bool(rouge_words(reference))
