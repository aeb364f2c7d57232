"""Rows to examples, with an account of every row: trained on, or dropped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from fourbit.config import DataSettings, Problem
from fourbit.data.fingerprint import Fingerprint, fingerprint
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

    examples      in the order of the rows; examples[i].row == i
    dropped       reason to number of rows (under split_turns, of exchanges)
    forms         form to number of rows, those dropped included
    rows          number of rows read
    tokens        of all examples; trained_tokens of them carry loss; longest is the longest example's length
    cut           what was done to rows that were too long and are used all the same, to number of rows
    parted        rows of which each answer has an example of its own
    fingerprints  source of a used row to the hashes of its text, as it is and normalised
    note          what is made good in every conversation of this chat template, or ""
    """

    examples: list[Example]
    dropped: dict[str, int]
    forms: dict[str, int]
    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    cut: dict[str, int] = field(default_factory=dict)
    parted: int = 0
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    note: str = ""

    def summary(self) -> str:
        """One line: rows and their form, examples, tokens, and what was dropped or cut."""
        mixed = len(self.forms) > 1
        forms = ", ".join(f"{n:,} {form}" if mixed else form for form, n in self.forms.items())
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items()) or "none"
        cut = "".join(f"; {n:,} {what}" for what, n in self.cut.items())
        return (
            f"{_count(self.rows, 'row')} ({forms}): {_count(len(self.examples), 'example')}, "
            f"{self.tokens:,} tokens, {self.trained_tokens:,} trained, "
            f"longest {self.longest:,}; dropped: {dropped}{cut}"
        )


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    progress: Progress | None = None,
) -> Encoded:
    """Render, tokenise and mask all rows.

    Documents are cut into chunks of max_length, so one row may give several examples, as may a conversation
    whose answers need texts of their own. Any other row longer than max_length is treated as
    `data.too_long` says and counted.

    Raises DataError if rows cannot be trained whose kind `data.allow` does not name; if there are no rows;
    or if none is left.
    """
    if not rows:
        raise DataError("there are no rows to train on; give a file with at least one")
    account = _Account(Renderer(tokenizer, settings), settings)
    for start in range(0, len(rows), _GROUP):
        account.add(rows[start : start + _GROUP])
        if progress is not None:
            progress("data", min(start + _GROUP, len(rows)), len(rows))
    account.check(len(rows))
    examples = [replace(example, row=index) for index, example in enumerate(account.examples)]
    return Encoded(
        examples=examples,
        dropped=dict(account.dropped),
        forms=dict(account.forms),
        rows=len(rows),
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(sum(example.trained) for example in examples),
        longest=max(len(example.input_ids) for example in examples),
        cut=dict(account.cut),
        parted=account.parted,
        fingerprints=account.fingerprints,
        note=account.note,
    )


class _Account:
    """The examples of the rows so far, and what became of the others."""

    def __init__(self, renderer: Renderer, settings: DataSettings) -> None:
        self.renderer, self.settings = renderer, settings
        self.examples: list[Example] = []
        self.fingerprints: dict[str, Fingerprint] = {}
        self.dropped: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self.problems: dict[Problem, list[str]] = {}
        self.parted = self.longest_dropped = 0
        self.note = ""

    def add(self, rows: Sequence[Row]) -> None:
        texts = [(row, text) for row in rows if (text := self._texts(row))]
        if not texts:
            return
        encoded = iter(self.renderer.tokenize([item.text for _, items in texts for item in items]))
        for row, items in texts:
            pairs = [(item, next(encoded)) for item in items]
            try:
                made = [e for pair in pairs for e in self.renderer.examples(*pair)]
            except RowError as error:
                self.problems.setdefault(error.problem, []).append(str(error))
                continue
            fitting = self._fitting(row, made)
            if fitting:
                self.examples += fitting
                self.fingerprints[row.source] = fingerprint(items[-1].text)
                self.parted += len(items) > 1

    def check(self, rows: int) -> None:
        """Raise DataError for problems that are not allowed, and if nothing is left."""
        for problem, messages in self.problems.items():
            self.dropped[problem] += len(messages)
        refused = {kind: m for kind, m in self.problems.items() if kind not in self.settings.allow}
        if refused:
            raise DataError(_refusal(refused))
        if self.examples:
            return
        if self.longest_dropped:
            raise DataError(
                f"every row is longer than data.max_length, {self.settings.max_length:,} tokens "
                f"(the longest has {self.longest_dropped:,}); raise it"
            )
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items())
        raise DataError(f"none of {_count(rows, 'row')} can be trained ({reasons}); give others")

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


def split_rows(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """`split`, where all examples of one row come to the same side."""
    train, heldout = split(_by_row(examples), fraction, seed)
    return [e for group in train for e in group], [e for group in heldout for e in group]


def sample_rows(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """All examples of `count` rows, as `sample` draws them."""
    return [example for group in sample(_by_row(examples), count, seed) for example in group]


def weighted(examples: Sequence[Example], weights: dict[str, float], seed: int) -> list[Example]:
    """Each row as often as the weight of its source says; what is left below one draws rows by seed.

    The copies of a row are examples of their own: `row` numbers all anew.
    """
    chosen: list[Example] = []
    groups: dict[float, list[list[Example]]] = {}
    for group in _by_row(examples):
        groups.setdefault(weights[group[0].source], []).append(group)
    for weight, members in groups.items():
        whole = int(weight)
        drawn = sample(members, round((weight - whole) * len(members)), seed)
        chosen += [example for group in members * whole + drawn for example in group]
    return [replace(example, row=index) for index, example in enumerate(chosen)]


def _by_row(examples: Sequence[Example]) -> list[list[Example]]:
    return [list(group) for _, group in groupby(examples, key=lambda example: example.source)]


def sample(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` of the items drawn by seed, in the order given; all of them if there are no more."""
    chosen = sorted(permutation(len(items), seed, SAMPLE)[:count])
    return [items[index] for index in chosen]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
