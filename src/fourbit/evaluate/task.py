"""A model scored on the rows of a file: answers by generation, by likelihood of given labels, and loss.

Prompts are those of training, up to where the answer begins. Generation and likelihood share one prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fourbit.config import DataSettings, EvalSettings
from fourbit.data.encode import encode, prompt_only
from fourbit.data.forms import Conversation, Document, interpret
from fourbit.data.row import Row
from fourbit.errors import DataError
from fourbit.evaluate.context import inference, prefill
from fourbit.evaluate.generate import Answer, answer_batch, decode, stop_ids
from fourbit.evaluate.heldout import HeldoutLoss, heldout_loss
from fourbit.evaluate.labels import answer_ids
from fourbit.evaluate.likelihood import Choice, choose_batch
from fourbit.evaluate.scores import Accuracy, Confusion, accuracy, confusions, exact_match, may_match
from fourbit.evaluate.trie import LabelTrie

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Called with what is being done, how much of it is done, and how much there is.
StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, for a person to look at; choice is the most likely label where labels were given."""

    prompt: str
    reference: str
    answer: str
    right: bool
    choice: str | None


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What `evaluate` found; parts that the rows do not allow, or that were not asked for, are None.

    accuracy         of generated answers, exact match
    choice_accuracy  of the most likely labels
    right            whether each row's generated answer is right
    choices          the index of each row's most likely label
    loss             of reference answers
    confusions       wrong answers by frequency; of labels where they were given, else of generated answers,
                     if those were completed
    cut              generated answers that reached the length limit, and are wrong for it
    seconds          wall-clock time
    """

    rows: int
    accuracy: Accuracy | None
    choice_accuracy: Accuracy | None
    right: list[bool] | None
    choices: list[int] | None
    loss: HeldoutLoss | None
    samples: list[Sample]
    confusions: list[Confusion]
    cut: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the per-row lists."""
        return {
            "rows": self.rows,
            "accuracy": _as_dict(self.accuracy),
            "choice_accuracy": _as_dict(self.choice_accuracy),
            "loss": self.loss.loss if self.loss else None,
            "perplexity": self.loss.perplexity if self.loss else None,
            "tokens": self.loss.tokens if self.loss else None,
            "samples": [asdict(sample) for sample in self.samples],
            "confusions": [asdict(confusion) for confusion in self.confusions[:20]],
            "cut_answers": self.cut,
            "seconds": self.seconds,
        }


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
    complete  False ends an answer as soon as it can no longer match its reference: the same accuracy in
              less time. Samples are completed anyway; wrong answers are then not counted by what they say.

    Plain text has no prompts; only its loss is taken. Raises DataError, naming the row.
    """
    if not rows:
        raise DataError("there are no rows to evaluate on; give a file with at least one")
    began = time.monotonic()
    is_text = isinstance(interpret(rows[0], data, chat=bool(tokenizer.chat_template)), Document)
    answered = None
    if not is_text:
        answered = _answer(
            model, tokenizer, rows, data, settings, labels, samples, complete, casefold, progress
        )
    elif not loss:
        raise DataError(f"{rows[0].source}: plain text has no answers to score; ask for its loss")
    heldout = _loss(model, tokenizer, rows, data, progress) if loss else None
    return EvalResult(
        rows=len(rows),
        accuracy=accuracy(answered.right) if answered else None,
        choice_accuracy=answered.choice_accuracy if answered else None,
        right=answered.right if answered else None,
        choices=answered.choices if answered else None,
        loss=heldout,
        samples=answered.samples if answered else [],
        confusions=answered.confusions if answered else [],
        cut=answered.cut if answered else 0,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, slots=True)
class _Answered:
    right: list[bool]
    choices: list[int] | None
    choice_accuracy: Accuracy | None
    samples: list[Sample]
    confusions: list[Confusion]
    cut: int


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
    prompts, references = zip(*(prompt_only(row, tokenizer, data) for row in rows), strict=True)
    shown = {number * len(rows) // samples for number in range(samples)} if samples else set()

    def go_on(index: int, ids: list[int]) -> bool:
        if complete or index in shown:
            return True
        return may_match(decode(tokenizer, ids), references[index], casefold)

    trie = None
    if labels is not None:
        sequences = answer_ids(labels, rows[0], tokenizer, data)
        trie = LabelTrie(sequences, next(model.parameters()).device)
    answers, chosen = _answer_all(model, prompts, stop_ids(model, tokenizer), settings, trie, go_on, progress)
    texts = [decode(tokenizer, answers[index].ids) for index in range(len(rows))]
    # An answer that the length limit cut off is not the reference, even where it looks like it so far.
    right = [
        answers[index].stopped and exact_match(texts[index], reference, casefold)
        for index, reference in enumerate(references)
    ]
    choices = [chosen[index].label for index in range(len(rows))] if labels is not None else None
    names = [labels[choice] for choice in choices] if labels is not None and choices is not None else None
    return _Answered(
        right=right,
        choices=choices,
        choice_accuracy=_choice_accuracy(names, references, casefold),
        samples=[
            Sample(
                prompt=_question(rows[index], data, tokenizer),
                reference=references[index],
                answer=texts[index],
                right=right[index],
                choice=names[index] if names else None,
            )
            for index in sorted(shown)
        ],
        confusions=_confusions(names, texts if complete else None, references, casefold),
        cut=sum(not a.stopped and len(a.ids) >= settings.max_new_tokens for a in answers.values()),
    )


def _answer_all(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop: frozenset[int],
    settings: EvalSettings,
    trie: LabelTrie | None,
    go_on: Callable[[int, list[int]], bool],
    progress: StageProgress | None,
) -> tuple[dict[int, Answer], dict[int, Choice]]:
    answers: dict[int, Answer] = {}
    chosen: dict[int, Choice] = {}
    parts = 1 if trie is None else 2  # of a row: its answer and its label

    def report() -> None:
        if progress is not None:
            progress("answers", (len(answers) + len(chosen)) // parts, len(prompts))

    with inference(model):
        for indices, context in prefill(model, prompts, settings.batch_size):
            if trie is not None:
                for row, choice in choose_batch(context.fork(), trie):
                    chosen[indices[row]] = choice
                    report()
            for index, answer in answer_batch(context, indices, stop, settings.max_new_tokens, go_on=go_on):
                answers[index] = answer
                report()
    return answers, chosen


def _loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    data: DataSettings,
    progress: StageProgress | None,
) -> HeldoutLoss:
    examples = encode(rows, tokenizer, data).examples
    pad = tokenizer.pad_token_id
    report = (lambda done, total: progress("loss", done, total)) if progress is not None else None
    return heldout_loss(model, examples, pad if pad is not None else 0, progress=report)


def _question(row: Row, data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    content = interpret(row, data, chat=bool(tokenizer.chat_template))
    assert not isinstance(content, Document)
    return content.messages[-2]["content"] if isinstance(content, Conversation) else content.prompt


def _choice_accuracy(names: list[str] | None, references: Sequence[str], casefold: bool) -> Accuracy | None:
    if names is None:
        return None
    pairs = zip(names, references, strict=True)
    return accuracy(exact_match(name, reference, casefold) for name, reference in pairs)


def _confusions(
    names: list[str] | None, texts: list[str] | None, references: Sequence[str], casefold: bool
) -> list[Confusion]:
    answers = names if names is not None else texts
    return confusions(answers, references, casefold) if answers is not None else []


def _as_dict(value: Accuracy | None) -> dict[str, float | int] | None:
    if value is None:
        return None
    return {name: getattr(value, name) for name in ("value", "low", "high", "right", "count")}
