"""Rows to examples, with an account of every row: trained on, or dropped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from fourbit.config import DataSettings
from fourbit.data.forms import Conversation, Document, interpret
from fourbit.data.order import SAMPLE, SPLIT, permutation
from fourbit.data.render import Example, Renderer, before_answer, tools_of, with_system
from fourbit.data.row import Row
from fourbit.data.template import ChatTemplate
from fourbit.data.tokens import leading_ids
from fourbit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Encoded:
    """What `encode` made of the rows.

    examples   in the order of the rows; examples[i].row == i
    dropped    reason to number of rows
    forms      form to number of rows, those dropped included
    rows       number of rows read
    tokens     of all examples; trained_tokens of them carry loss; longest is the longest example's length
    """

    examples: list[Example]
    dropped: dict[str, int]
    forms: dict[str, int]
    rows: int
    tokens: int
    trained_tokens: int
    longest: int

    def summary(self) -> str:
        """One line: rows and their form, examples, tokens, and what was dropped."""
        mixed = len(self.forms) > 1
        forms = ", ".join(f"{n:,} {form}" if mixed else form for form, n in self.forms.items())
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items()) or "none"
        return (
            f"{_count(self.rows, 'row')} ({forms}): {_count(len(self.examples), 'example')}, "
            f"{self.tokens:,} tokens, {self.trained_tokens:,} trained, "
            f"longest {self.longest:,}; dropped: {dropped}"
        )


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> Encoded:
    """Render, tokenise and mask all rows.

    Documents are cut into chunks of max_length, so one row may give several examples. Any other row
    longer than max_length is dropped and counted, never cut.

    Raises DataError, naming the row, for one that cannot be rendered or has no trained token; and if
    there are no rows or all were dropped.
    """
    if not rows:
        raise DataError("there are no rows to train on; give a file with at least one")
    renderer = Renderer(tokenizer, settings)
    rendered = [text for row in rows for text in renderer.texts(row)]
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    longest_dropped = 0
    for item, tokens in zip(rendered, renderer.tokenize([item.text for item in rendered]), strict=True):
        for example in renderer.examples(item, tokens):
            length = len(example.input_ids)
            if length > settings.max_length:
                dropped[f"longer than {settings.max_length:,} tokens"] += 1
                longest_dropped = max(longest_dropped, length)
            else:
                examples.append(replace(example, row=len(examples)))
    if not examples:
        raise DataError(
            f"every row is longer than data.max_length, {settings.max_length:,} tokens "
            f"(the longest has {longest_dropped:,}); raise it"
        )
    return Encoded(
        examples=examples,
        dropped=dict(dropped),
        forms=dict(Counter(item.form for item in rendered)),
        rows=len(rows),
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(sum(example.trained) for example in examples),
        longest=max(len(example.input_ids) for example in examples),
    )


def prompt_only(
    row: Row, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[list[int], str]:
    """The token ids of a row's prompt as the model sees it at inference, and the reference answer.

    Of a conversation, everything before its last turn, with the generation prompt; the answer is that
    turn's content. Raises DataError, naming the row; a document has no prompt.
    """
    content = interpret(row, settings, chat=bool(tokenizer.chat_template))
    if isinstance(content, Document):
        raise DataError(
            f"{row.source}: plain text has no prompt and no answer; use prompt and completion columns"
        )
    if tokenizer.chat_template:
        messages = with_system(content, settings)
        text = ChatTemplate(tokenizer).text(
            messages[:-1], row.source, answer_next=True, tools=tools_of(content)
        )
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], messages[-1]["content"]
    assert not isinstance(content, Conversation)
    ids = tokenizer(before_answer(content), add_special_tokens=False, verbose=False)["input_ids"]
    return [*leading_ids(tokenizer), *ids], content.completion


def split(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Train and held-out parts of rows or examples, each in the order given.

    `fraction` of the items, rounded, is held out: at least one if fraction is above 0, and never all.
    Raises DataError if there are too few items to hold one out.
    """
    if fraction == 0:
        return list(items), []
    if len(items) < 2:
        raise DataError("one row cannot be split; add rows or set data.heldout_fraction to 0")
    count = min(max(round(fraction * len(items)), 1), len(items) - 1)
    heldout = set(permutation(len(items), seed, SPLIT)[:count])
    return (
        [item for index, item in enumerate(items) if index not in heldout],
        [item for index, item in enumerate(items) if index in heldout],
    )


def sample(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` of the items drawn by seed, in the order given; all of them if there are no more."""
    chosen = sorted(permutation(len(items), seed, SAMPLE)[:count])
    return [items[index] for index in chosen]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
