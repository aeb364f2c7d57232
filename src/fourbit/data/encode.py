"""Rows to examples, with an account of every row: trained on, or dropped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fourbit.config import DataSettings, Problem
from fourbit.data.examples import Examples, ExampleWriter
from fourbit.data.fingerprint import fingerprint
from fourbit.data.forms import Conversation, Document, interpret
from fourbit.data.order import SAMPLE, SPLIT, permutation
from fourbit.data.render import Example, Rendered, Renderer, before_answer, tools_of, with_system
from fourbit.data.row import Row, RowError
from fourbit.data.template import ChatTemplate
from fourbit.data.tokens import leading_ids
from fourbit.data.truncate import keep_end, split_turns
from fourbit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


#: Rows rendered and tokenised together; between two such groups progress is reported.
_GROUP = 512

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What `encode` made of the rows.

    examples  in the order of the rows; examples[i].row == i
    used      of each used row its number among those read, and hashes of its text (`examples.ROWS`)
    dropped   reason to number of rows (under split_turns, of exchanges)
    forms     form to number of rows, those dropped included
    rows      number of rows read
    cut       what was done to rows that were too long and are used all the same, to number of rows
    parted    rows of which each answer has an example of its own
    note      what is made good in every conversation of this chat template, or ""
    origin    where the tokens come from if they were not made now
    """

    examples: Examples
    used: np.ndarray[Any, Any]
    dropped: dict[str, int]
    forms: dict[str, int]
    rows: int
    cut: dict[str, int] = field(default_factory=dict)
    parted: int = 0
    note: str = ""
    origin: str = ""

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return int(self.examples.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        """How many of them carry loss."""
        return int(self.examples.trained.sum())

    def summary(self) -> str:
        """One line: rows and their form, examples, tokens, and what was dropped or cut."""
        mixed = len(self.forms) > 1
        forms = ", ".join(f"{n:,} {form}" if mixed else form for form, n in self.forms.items())
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items()) or "none"
        cut = "".join(f"; {n:,} {what}" for what, n in self.cut.items())
        return (
            f"{_count(self.rows, 'row')} ({forms}): {_count(len(self.examples), 'example')}, "
            f"{self.tokens:,} tokens, {self.trained_tokens:,} trained, "
            f"longest {self.examples.lengths.max():,}; dropped: {dropped}{cut}"
            + (f"; {self.origin}" if self.origin else "")
        )


def encode(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    progress: Progress | None = None,
    writer: ExampleWriter | None = None,
) -> Encoded:
    """Render, tokenise and mask all rows.

    Documents are cut into chunks of max_length, so one row may give several examples, as may a conversation
    whose answers need texts of their own. Any other row longer than max_length is treated as
    `data.too_long` says and counted.

    progress  called with "data", rows done, and rows in all, or 0 where that is not known beforehand
    writer    takes the examples; None: one that keeps them in memory

    Raises DataError if rows cannot be trained whose kind `data.allow` does not name; if there are no rows;
    or if none is left.
    """
    account = _Account(
        Renderer(tokenizer, settings), settings, writer if writer is not None else ExampleWriter()
    )
    total = len(rows) if isinstance(rows, Sized) else 0
    remaining = iter(rows)
    while group := list(islice(remaining, _GROUP)):
        account.add(group)
        if progress is not None:
            progress("data", account.rows, total)
    account.check()
    return Encoded(
        examples=account.writer.examples(),
        used=account.writer.arrays()[1],
        dropped=dict(account.dropped),
        forms=dict(account.forms),
        rows=account.rows,
        cut=dict(account.cut),
        parted=account.parted,
        note=account.note,
    )


class _Account:
    """The examples of the rows so far, and what became of the others."""

    def __init__(self, renderer: Renderer, settings: DataSettings, writer: ExampleWriter) -> None:
        self.renderer, self.settings, self.writer = renderer, settings, writer
        self.rows = 0
        self.dropped: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self.problems: dict[Problem, list[str]] = {}
        self.parted = self.longest_dropped = 0
        self.note = ""

    def add(self, rows: Sequence[Row]) -> None:
        texts = [
            (number, row, text) for number, row in enumerate(rows, self.rows) if (text := self._texts(row))
        ]
        self.rows += len(rows)
        if not texts:
            return
        encoded = iter(self.renderer.tokenize([item.text for _, _, items in texts for item in items]))
        for number, row, items in texts:
            pairs = [(item, next(encoded)) for item in items]
            try:
                made = [e for pair in pairs for e in self.renderer.examples(*pair)]
            except RowError as error:
                self.problems.setdefault(error.problem, []).append(str(error))
                continue
            fitting = self._fitting(row, made)
            if fitting:
                self.writer.add(row, number, fitting, fingerprint(items[-1].text))
                self.parted += len(items) > 1

    def check(self) -> None:
        """Raise DataError for problems that are not allowed, and if nothing is left."""
        if not self.rows:
            raise DataError("there are no rows to train on; give a file with at least one")
        for problem, messages in self.problems.items():
            self.dropped[problem] += len(messages)
        refused = {kind: m for kind, m in self.problems.items() if kind not in self.settings.allow}
        if refused:
            raise DataError(_refusal(refused))
        if len(self.writer):
            return
        if self.longest_dropped:
            raise DataError(
                f"every row is longer than data.max_length, {self.settings.max_length:,} tokens "
                f"(the longest has {self.longest_dropped:,}); raise it"
            )
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items())
        raise DataError(f"none of {_count(self.rows, 'row')} can be trained ({reasons}); give others")

    def _texts(self, row: Row) -> list[Rendered]:
        try:
            texts = self.renderer.texts(row)
        except RowError as error:
            self.problems.setdefault(error.problem, []).append(str(error))
            return []
        self.forms[texts[0].form] += 1
        if self.renderer.template is not None and not texts[0].document and not self.note:
            self.note = self.renderer.template.note(row.source)
        return texts

    def _fitting(self, row: Row, examples: list[Example]) -> list[Example]:
        """The examples of a row that are not too long, the others made so or dropped and counted."""
        limit = self.settings.max_length
        if all(len(example.input_ids) <= limit for example in examples):
            return examples
        self.longest_dropped = max(self.longest_dropped, *(len(example.input_ids) for example in examples))
        reason = f"longer than {limit:,} tokens"
        if self.settings.too_long == "split_turns":
            pieces, lost = split_turns(row, self.settings, self.renderer.template is not None, self._fits)
            if pieces:
                self.cut["split at turns"] += 1
            if lost:
                self.dropped[reason] += lost
            return [example for piece in pieces for example in self._examples(piece)]
        fitting = [example for example in examples if len(example.input_ids) <= limit]
        if self.settings.too_long == "keep_end":
            bos = self.renderer.tokenizer.bos_token_id
            shortened = [
                example
                if len(example.input_ids) <= limit
                else keep_end(example, limit, bos, self.settings.loss)
                for example in examples
            ]
            fitting = [example for example in shortened if example is not None]
            if fitting:
                self.cut["kept the end"] += 1
        if len(fitting) < len(examples):
            self.dropped[reason] += 1
        return fitting

    def _fits(self, row: Row) -> bool:
        return all(len(example.input_ids) <= self.settings.max_length for example in self._examples(row))

    def _examples(self, row: Row) -> list[Example]:
        texts = self.renderer.texts(row)
        tokens = self.renderer.tokenize([text.text for text in texts])
        return [e for pair in zip(texts, tokens, strict=True) for e in self.renderer.examples(*pair)]


def _refusal(problems: dict[Problem, list[str]]) -> str:
    """One line on rows that cannot be trained: how many of each kind, the first of all, and the way on."""
    first = min((messages[0] for messages in problems.values()), key=len)
    total = sum(len(messages) for messages in problems.values())
    way = f"`data.allow: [{', '.join(problems)}]` drops such rows"
    if total == 1:
        return f"{first} ({way})"
    counts = ", ".join(f"{len(messages):,} {kind}" for kind, messages in problems.items())
    return f"{total:,} rows cannot be trained ({counts}), one of them: {first} ({way})"


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


def split_rows(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """`split`, where all examples of one row come to the same side."""
    rows = _rows_of(examples)
    heldout = np.zeros(len(examples), dtype=bool)
    if fraction:
        _, chosen = split(range(_count_rows(rows)), fraction, seed)
        heldout = np.isin(rows, chosen)
    return examples.take(np.flatnonzero(~heldout)), examples.take(np.flatnonzero(heldout))


def sample_rows(examples: Examples, count: int, seed: int) -> Examples:
    """All examples of `count` rows, as `sample` draws them."""
    rows = _rows_of(examples)
    return examples.take(np.flatnonzero(np.isin(rows, sample(range(_count_rows(rows)), count, seed))))


def weighted(examples: Examples, weights: Sequence[float], seed: int) -> Examples:
    """Each row as often as its weight says; what is left below one draws rows by seed.

    weights  [N] of each example, the same for all of a row

    The copies of a row are examples of their own: `row` numbers all anew.
    """
    rows = _rows_of(examples)
    chosen: list[np.ndarray[Any, Any]] = []
    for weight in dict.fromkeys(weights):
        places = np.flatnonzero(np.array(weights) == weight)
        members = np.unique(rows[places]).tolist()
        whole = int(weight)
        drawn = sample(members, round((weight - whole) * len(members)), seed)
        chosen += [places] * whole + [places[np.isin(rows[places], drawn)]]
    return examples.take(np.concatenate(chosen), renumber=True)


def _rows_of(examples: Examples) -> np.ndarray[Any, Any]:
    """[N] the row of each example, numbered from 0 among those that occur."""
    numbers: np.ndarray[Any, Any] = np.unique(examples.rows, return_inverse=True)[1]
    return numbers


def _count_rows(rows: np.ndarray[Any, Any]) -> int:
    return int(rows.max()) + 1 if len(rows) else 0


def sample(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` of the items drawn by seed, in the order given; all of them if there are no more."""
    chosen = sorted(permutation(len(items), seed, SAMPLE)[:count])
    return [items[index] for index in chosen]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
