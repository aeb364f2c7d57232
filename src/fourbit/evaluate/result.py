"""What an evaluation found, as a whole and row by row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fourbit.evaluate.confusion import ConfusionTable
from fourbit.evaluate.heldout import HeldoutLoss
from fourbit.evaluate.intervals import (
    Difference,
    Estimate,
    difference_interval,
    loss_interval,
    paired_interval,
)
from fourbit.evaluate.scores import Accuracy, Confusion, as_dict

#: Names beside those of the metrics.
CHOICE, LOSS = "likeliest_label", "loss"


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, for a person to look at.

    right   by the first metric that knows right and wrong; None if there is none
    choice  the most likely label where labels were given
    """

    prompt: str
    reference: str
    answer: str
    right: bool | None
    choice: str | None


@dataclass(frozen=True, slots=True)
class RowScore:
    """One row's scores.

    source        "file:line"
    scores        by metric, from 0 to 1
    cut           whether the answer reached the length limit
    choice        the most likely label; None without labels, or where all that is known is that it is not
                  the reference
    choice_right  whether it is the reference; None without labels
    loss          nats, summed over the reference's tokens; None if not asked for or the row is too long
    tokens        how many of them there are
    """

    source: str
    prompt: str | None
    reference: str | None
    answer: str | None
    scores: dict[str, float]
    cut: bool
    choice: str | None
    choice_right: bool | None
    loss: float | None
    tokens: int

    def to_dict(self, with_text: bool) -> dict[str, Any]:
        """Plain values for JSON, without what is None; texts only on request."""
        found: dict[str, Any] = {**self.scores, "cut": self.cut}
        if self.choice_right is not None:
            found[CHOICE] = self.choice_right
        if self.loss is not None:
            found |= {LOSS: self.loss, "tokens": self.tokens}
        if with_text:
            found |= {"answer": self.answer, "label": self.choice}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What `evaluate` found; parts that the rows do not allow, or that were not asked for, are None or empty.

    metrics          mean of each metric of `eval.metrics` over the generated answers
    accuracy         of the first of them that knows right and wrong: exact match unless set otherwise
    choice_accuracy  of the most likely labels
    right            whether each row's generated answer is right, by the same metric as accuracy
    choices          the index of each row's most likely label; None where it is only known not to be the
                     reference
    loss             of reference answers
    confusions       wrong answers by frequency, if they were completed; of labels where they were given, else
                     of generated answers
    table            the same as a table, for a classification with few labels
    cut              generated answers that reached the length limit
    dropped          rows longer than data.max_length, which the loss leaves out
    row_scores       one for each row, in their order
    seconds          wall-clock time
    """

    rows: int
    metrics: dict[str, Estimate]
    accuracy: Accuracy | None
    choice_accuracy: Accuracy | None
    right: list[bool] | None
    choices: list[int | None] | None
    loss: HeldoutLoss | None
    samples: list[Sample]
    confusions: list[Confusion]
    table: ConfusionTable | None
    cut: int
    dropped: int
    row_scores: list[RowScore]
    seconds: float

    def to_dict(self, with_text: bool = False) -> dict[str, Any]:
        """Plain values for JSON, without the per-row lists; what quotes the rows only on request."""
        found = {
            "rows": self.rows,
            "metrics": {name: asdict(estimate) for name, estimate in self.metrics.items()},
            "accuracy": as_dict(self.accuracy) if self.accuracy else None,
            "choice_accuracy": as_dict(self.choice_accuracy) if self.choice_accuracy else None,
            "loss": self.loss.loss if self.loss else None,
            "perplexity": self.loss.perplexity if self.loss else None,
            "tokens": self.loss.tokens if self.loss else None,
            "cut_answers": self.cut,
            "dropped_rows": self.dropped,
            "seconds": self.seconds,
        }
        if with_text:
            found |= {
                "samples": [asdict(sample) for sample in self.samples],
                "confusions": [asdict(confusion) for confusion in self.confusions[:20]],
                "confusion_table": asdict(self.table) if self.table else None,
            }
        return found


def differences(first: EvalResult, second: EvalResult) -> dict[str, Difference]:
    """second minus first on the same rows: each metric by its name, `likeliest_label` and `loss`."""
    found: dict[str, Difference] = {}
    pairs = list(zip(first.row_scores, second.row_scores, strict=True))
    for name, estimate in first.metrics.items():
        before, after = [a.scores[name] for a, _ in pairs], [b.scores[name] for _, b in pairs]
        if estimate.method == "wilson":
            found[name] = difference_interval([a == 1 for a in before], [b == 1 for b in after])
        else:
            found[name] = paired_interval(before, after)
    chosen = [(a.choice_right, b.choice_right) for a, b in pairs]
    both = [(a, b) for a, b in chosen if a is not None and b is not None]
    if both:
        found[CHOICE] = difference_interval([a for a, _ in both], [b for _, b in both])
    if first.loss is not None and second.loss is not None:
        scored = [(a.loss, b.loss, a.tokens) for a, b in pairs if a.loss is not None and b.loss is not None]
        found[LOSS] = loss_interval(*(list(column) for column in zip(*scored, strict=True)))
    return found
