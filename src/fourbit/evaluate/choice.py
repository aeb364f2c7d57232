"""Multiple choice as QLoRA scores MMLU: the option letter with the highest next-token logit after `Answer:`.

One forward pass a question, no text is generated, and only the letters compete. Dettmers et al.
(arXiv:2305.14314, section 5.2) report the mean of the subjects' accuracies; the plain mean stands beside it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fourbit.config import EvalSettings
from fourbit.data.template import ChatTemplate
from fourbit.data.tokens import TextTokenizer, leading_ids
from fourbit.errors import DataError
from fourbit.evaluate.context import Progress, inference, prefill, transformers_model
from fourbit.evaluate.intervals import (
    Difference,
    Estimate,
    difference_interval,
    stratified_difference,
    stratified_interval,
)
from fourbit.evaluate.questions import Question, prompt_texts
from fourbit.evaluate.scores import Accuracy, accuracy, as_dict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """What `evaluate_choice` found.

    accuracy      of all questions alike
    subjects      accuracy by subject, in the order of their first questions; empty if the rows name none
    subject_mean  mean of the subjects' accuracies, or None
    questions     those that were asked
    answers       the chosen letter of each
    right         whether it is the right one
    confidence    its probability among the letters alone
    """

    accuracy: Accuracy
    subjects: dict[str, Accuracy]
    subject_mean: Estimate | None
    questions: list[Question]
    answers: list[str]
    right: list[bool]
    confidence: list[float]
    seconds: float

    @property
    def rows(self) -> int:
        """How many questions were answered."""
        return self.accuracy.count

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the per-row lists."""
        return {
            "rows": self.rows,
            "accuracy": as_dict(self.accuracy),
            "subject_mean": asdict(self.subject_mean) if self.subject_mean else None,
            "subjects": {name: as_dict(found) for name, found in self.subjects.items()},
            "letters": dict(sorted(Counter(self.answers).items())),
            "seconds": self.seconds,
        }


def differences(first: ChoiceResult, second: ChoiceResult) -> dict[str, Difference]:
    """second minus first on the same questions: `accuracy`, and `subject_mean` where there are subjects."""
    found = {"accuracy": difference_interval(first.right, second.right)}
    groups: dict[str, tuple[list[bool], list[bool]]] = {}
    for question, before, after in zip(first.questions, first.right, second.right, strict=True):
        if question.subject is not None:
            marks = groups.setdefault(question.subject, ([], []))
            marks[0].append(before)
            marks[1].append(after)
    if groups:
        found["subject_mean"] = stratified_difference(list(groups.values()))
    return found


@dataclass(frozen=True, slots=True)
class ChoicePrompt:
    """ids: what the model reads; letters: the id of each option's letter, as the token that comes next."""

    ids: list[int]
    letters: list[int]


def evaluate_choice(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: EvalSettings,
    *,
    examples: Sequence[Question] = (),
    progress: Progress | None = None,
) -> ChoiceResult:
    """Answer all questions; examples: those of `eval.shots_file`. progress(done, questions).

    Raises DataError, naming the row, for a question that cannot be asked or is longer than the context.
    """
    if not questions:
        raise DataError("there are no questions to evaluate on; give a file with at least one")
    began = time.monotonic()
    prompts = choice_prompts(questions, tokenizer, settings, examples)
    _check_lengths(prompts, questions, model)
    chosen: dict[int, tuple[int, float]] = {}
    with inference(model):
        for group in _groups(questions, settings.shots):
            for indices, context in prefill(model, [prompts[i].ids for i in group], settings.batch_size):
                for row, index in enumerate(indices):
                    letters = torch.tensor(prompts[group[index]].letters, device=context.logits.device)
                    shares = context.logits[row, letters].double().softmax(dim=0)
                    best = int(shares.argmax())
                    chosen[group[index]] = best, float(shares[best])
                if progress is not None:
                    progress(len(chosen), len(questions))
    right = [chosen[index][0] == question.answer for index, question in enumerate(questions)]
    subjects = _by_subject(questions, right)
    return ChoiceResult(
        accuracy=accuracy(right),
        subjects=subjects,
        subject_mean=stratified_interval(list(subjects.values())) if subjects else None,
        questions=list(questions),
        answers=[question.letters[chosen[index][0]] for index, question in enumerate(questions)],
        right=right,
        confidence=[chosen[index][1] for index in range(len(questions))],
        seconds=time.monotonic() - began,
    )


def choice_prompts(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvalSettings,
    examples: Sequence[Question] = (),
) -> list[ChoicePrompt]:
    """Prompts and letters as token ids.

    The prompt is tokenised together with each letter, since what stands before a letter can change its token:
    the prompt is what all of these have in common, and the letters are the tokens in which they differ.
    """
    texts = prompt_texts(questions, examples, settings.shots)
    if settings.choice_prompt == "chat":
        if not tokenizer.chat_template:
            raise DataError(
                "eval.choice_prompt is chat, but this model has no chat template; set it to plain"
            )
        template, lead = ChatTemplate(tokenizer), []
        turns = [[{"role": "user", "content": text}] for text in texts]
        pairs = zip(turns, questions, strict=True)
        texts = [template.text(turn, question.source, answer_next=True) for turn, question in pairs]
    else:
        # A space before a letter belongs to its token.
        texts, lead = [text.rstrip(" ") for text in texts], leading_ids(tokenizer)
    space = "" if settings.choice_prompt == "chat" else " "
    wholes = [
        text + (letter if text[-1:].isspace() else space + letter)
        for text, question in zip(texts, questions, strict=True)
        for letter in question.letters
    ]
    tokens = iter(TextTokenizer(tokenizer)(wholes))
    return [
        _prompt([[*lead, *next(tokens).ids] for _ in question.letters], question) for question in questions
    ]


def _prompt(sequences: list[list[int]], question: Question) -> ChoicePrompt:
    shared = 0
    shortest = min(map(len, sequences))
    while shared < shortest and len({ids[shared] for ids in sequences}) == 1:
        shared += 1
    letters = [ids[shared] for ids in sequences if len(ids) > shared]
    if not shared or len(set(letters)) < len(sequences):
        raise DataError(
            f"{question.source}: the tokenizer does not write each of {', '.join(question.letters)} as a "
            "token of its own after the prompt, so the letters cannot be compared"
        )
    return ChoicePrompt(sequences[0][:shared], letters)


def _groups(questions: Sequence[Question], shots: int) -> list[list[int]]:
    """Indices of the questions that are read together: with examples, those that share them.

    A common beginning is computed once (`prefill`); without examples it is short, and full batches gain more.
    """
    groups: dict[str | None, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(question.subject if shots else None, []).append(index)
    return list(groups.values())


def _by_subject(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, Accuracy]:
    marks: dict[str, list[bool]] = {}
    for question, mark in zip(questions, right, strict=True):
        if question.subject is not None:
            marks.setdefault(question.subject, []).append(mark)
    return {subject: accuracy(found) for subject, found in marks.items()}


def _check_lengths(prompts: Sequence[ChoicePrompt], questions: Sequence[Question], model: Any) -> None:
    most = getattr(transformers_model(model).config.get_text_config(), "max_position_embeddings", None)
    for prompt, question in zip(prompts, questions, strict=True):
        if most is not None and len(prompt.ids) > most:
            raise DataError(
                f"{question.source}: the prompt has {len(prompt.ids):,} tokens, the model reads {most:,}; "
                "lower eval.shots or remove the row"
            )
