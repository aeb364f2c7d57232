"""A model scored on the rows of a file: answers by generation, by likelihood of given labels, and loss.

Prompts are those of training, up to where the answer begins. Generation and likelihood share one prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from fourbit.config import DataSettings, EvalSettings
from fourbit.data.encode import encode, prompt_only
from fourbit.data.forms import Conversation, Document, interpret
from fourbit.data.row import Row
from fourbit.errors import ConfigError, DataError
from fourbit.evaluate.confusion import ConfusionTable, confusion_table
from fourbit.evaluate.context import inference, prefill
from fourbit.evaluate.generate import Answer, answer_batch, decode, stop_ids
from fourbit.evaluate.heldout import RowLoss, example_losses, total_loss
from fourbit.evaluate.intervals import Estimate
from fourbit.evaluate.labels import answer_ids
from fourbit.evaluate.likelihood import Choice, LabelSearch
from fourbit.evaluate.metrics.metric import Metric, metrics_of
from fourbit.evaluate.result import EvalResult, RowScore, Sample
from fourbit.evaluate.scores import Accuracy, Confusion, accuracy, confusions, exact_match, may_match
from fourbit.evaluate.trie import LabelTrie

__all__ = ["EvalResult", "Sample", "evaluate"]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Called with what is being done, how much of it is done, and how much there is.
StageProgress = Callable[[str, int, int], None]


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    data: DataSettings,
    settings: EvalSettings,
    *,
    labels: Sequence[str] | None = None,
    loss: bool = True,
    samples: int = 3,
    complete: bool = True,
    casefold: bool = False,
    progress: StageProgress | None = None,
) -> EvalResult:
    """Score a causal LM (dense, 4-bit, or with an adapter) on rows.

    labels    also choose the most likely of these for each row, end of turn included
    loss      also the token-weighted loss of the reference answers
    samples   so many rows, evenly spread, are kept to look at
    complete  False ends an answer as soon as it can no longer match its reference, and the search for the
              most likely label as soon as another one is likelier: the same accuracies in less time.
              Samples are completed anyway; wrong answers are then not counted by what they say.

    Plain text has no prompts; only its loss is taken. Raises DataError, naming the row, and ConfigError if
    complete is False with other metrics than exact_match.
    """
    if not rows:
        raise DataError("there are no rows to evaluate on; give a file with at least one")
    if not complete and settings.metrics != ("exact_match",):
        raise ConfigError(
            f"answers cannot be broken off early where {', '.join(settings.metrics)} score them: "
            "only exact_match knows when one is already wrong"
        )
    began = time.monotonic()
    is_text = isinstance(interpret(rows[0], data, chat=bool(tokenizer.chat_template)), Document)
    answered = None
    if not is_text:
        answered = _answer(
            model, tokenizer, rows, data, settings, labels, samples, complete, casefold, progress
        )
    elif not loss:
        raise DataError(f"{rows[0].source}: plain text has no answers to score; ask for its loss")
    losses = _losses(model, tokenizer, rows, data, progress) if loss else [None] * len(rows)
    known = [found for found in losses if found is not None]
    scored = [
        replace(row, loss=found.loss if found else None, tokens=found.tokens if found else 0)
        for row, found in zip(answered.rows if answered else map(_unscored, rows), losses, strict=True)
    ]
    return EvalResult(
        rows=len(rows),
        metrics=answered.metrics if answered else {},
        accuracy=accuracy(answered.right) if answered and answered.right is not None else None,
        choice_accuracy=answered.choice_accuracy if answered else None,
        right=answered.right if answered else None,
        choices=answered.choices if answered else None,
        loss=total_loss(known) if loss else None,
        samples=answered.samples if answered else [],
        confusions=answered.confusions if answered else [],
        table=answered.table if answered else None,
        cut=sum(row.cut for row in scored),
        dropped=len(losses) - len(known) if loss else 0,
        row_scores=scored,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, slots=True)
class _Answered:
    """The parts of an EvalResult that come of answers; rows still without their losses."""

    rows: list[RowScore]
    metrics: dict[str, Estimate]
    right: list[bool] | None
    choices: list[int | None] | None
    choice_accuracy: Accuracy | None
    samples: list[Sample]
    confusions: list[Confusion]
    table: ConfusionTable | None


def _answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    data: DataSettings,
    settings: EvalSettings,
    labels: Sequence[str] | None,
    samples: int,
    complete: bool,
    casefold: bool,
    progress: StageProgress | None,
) -> _Answered:
    metrics = metrics_of(settings, casefold)
    prompts, references = zip(*(prompt_only(row, tokenizer, data) for row in rows), strict=True)
    for row, reference in zip(rows, references, strict=True):
        for metric in metrics:
            metric.check(reference, row.source)
    shown = {number * len(rows) // samples for number in range(samples)} if samples else set()

    def go_on(index: int, ids: list[int]) -> bool:
        if complete or index in shown:
            return True
        return may_match(decode(tokenizer, ids), references[index], casefold)

    search = None
    if labels is not None:
        sequences = answer_ids(labels, rows[0], tokenizer, data)
        trie = LabelTrie(sequences, next(model.parameters()).device)
        search = LabelSearch(trie, None if complete else _wanted(references, labels, shown, casefold))
    stop = stop_ids(model, tokenizer)
    answers, chosen = _answer_all(model, prompts, stop, settings, search, go_on, progress)
    scored = [
        _row_score(
            row,
            _question(row, data, tokenizer),
            references[index],
            answers[index],
            decode(tokenizer, answers[index].ids),
            metrics,
            _label(chosen[index], labels) if labels is not None else None,
            labels is not None,
            settings.max_new_tokens,
            casefold,
        )
        for index, row in enumerate(rows)
    ]
    decisive = next((metric.name for metric in metrics if not metric.graded), None)
    right = [row.scores[decisive] == 1 for row in scored] if decisive is not None else None
    given = [row.choice for row in scored] if labels is not None else [_whole(row) for row in scored]
    return _Answered(
        rows=scored,
        metrics={metric.name: metric.mean([row.scores[metric.name] for row in scored]) for metric in metrics},
        right=right,
        choices=[chosen[index].label for index in range(len(rows))] if labels is not None else None,
        choice_accuracy=accuracy(bool(row.choice_right) for row in scored) if labels is not None else None,
        samples=[_sample(scored[index], right[index] if right else None) for index in sorted(shown)],
        confusions=confusions([row.choice or row.answer or "" for row in scored], references, casefold)
        if complete
        else [],
        table=confusion_table(given, references, labels, casefold) if complete else None,
    )


def _row_score(
    row: Row,
    question: str,
    reference: str,
    answer: Answer,
    text: str,
    metrics: Sequence[Metric],
    choice: str | None,
    has_choice: bool,
    most: int,
    casefold: bool,
) -> RowScore:
    # What the length limit cut off is not the whole answer, even where it looks like it so far.
    scores = {
        metric.name: float(metric.score(text, reference)) if answer.stopped or not metric.whole else 0.0
        for metric in metrics
    }
    return RowScore(
        source=row.source,
        prompt=question,
        reference=reference,
        answer=text,
        scores=scores,
        cut=not answer.stopped and len(answer.ids) >= most,
        choice=choice,
        choice_right=choice is not None and exact_match(choice, reference, casefold) if has_choice else None,
        loss=None,
        tokens=0,
    )


def _label(choice: Choice, labels: Sequence[str]) -> str | None:
    return None if choice.label is None else labels[choice.label]


def _wanted(
    references: Sequence[str], labels: Sequence[str], shown: set[int], casefold: bool
) -> list[int | None]:
    """The label that is each row's reference; None where the most likely one is to be found in any case."""

    def only(reference: str) -> int | None:
        same = [number for number, label in enumerate(labels) if exact_match(label, reference, casefold)]
        return same[0] if len(same) == 1 else None

    numbers = {reference: only(reference) for reference in set(references)}
    return [None if index in shown else numbers[reference] for index, reference in enumerate(references)]


def _unscored(row: Row) -> RowScore:
    """Of plain text."""
    return RowScore(row.source, None, None, None, {}, False, None, None, None, 0)


def _whole(row: RowScore) -> str | None:
    return None if row.cut else row.answer


def _sample(row: RowScore, right: bool | None) -> Sample:
    return Sample(row.prompt or "", row.reference or "", row.answer or "", right, row.choice)


def _answer_all(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop: frozenset[int],
    settings: EvalSettings,
    search: LabelSearch | None,
    go_on: Callable[[int, list[int]], bool],
    progress: StageProgress | None,
) -> tuple[dict[int, Answer], dict[int, Choice]]:
    answers: dict[int, Answer] = {}
    chosen: dict[int, Choice] = {}
    parts = 1 if search is None else 2  # of a row: its answer and its label

    def report() -> None:
        if progress is not None:
            progress("answers", (len(answers) + len(chosen)) // parts, len(prompts))

    with inference(model):
        for indices, context in prefill(model, prompts, settings.batch_size):
            if search is not None:
                for index, choice in search.choose(indices, context.fork()):
                    chosen[index] = choice
                    report()
            for index, answer in answer_batch(context, indices, stop, settings.max_new_tokens, go_on=go_on):
                answers[index] = answer
                report()
    return answers, chosen


def _losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    data: DataSettings,
    progress: StageProgress | None,
) -> list[RowLoss | None]:
    """The loss of each row; None for one that data.max_length drops."""
    examples = encode(rows, tokenizer, data).examples
    pad = tokenizer.pad_token_id
    report = (lambda done, total: progress("loss", done, total)) if progress is not None else None
    losses = example_losses(model, examples, pad if pad is not None else 0, progress=report)
    found: list[RowLoss | None] = [None] * len(rows)
    place = 0
    # Examples come in the order of the rows; a document gives several.
    for example, loss in zip(examples, losses, strict=True):
        while rows[place].source != example.source:
            place += 1
        before = found[place]
        found[place] = RowLoss(before.loss + loss.loss, before.tokens + loss.tokens) if before else loss
    return found


def _question(row: Row, data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    content = interpret(row, data, chat=bool(tokenizer.chat_template))
    assert not isinstance(content, Document)
    return content.messages[-2]["content"] if isinstance(content, Conversation) else content.prompt
