"""What stands before training: rows to training and held-out examples, and a report of all of it.

Rows that cannot be trained refuse the run in `encode`, unless the settings allow their kind. What may be
meant, duplicates and held-out rows that are trained on too, is reported and does not refuse.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fourbit.config import DataSettings
from fourbit.data.cache import encode_files
from fourbit.data.encode import Encoded, Progress, sample_rows, split_rows, weighted
from fourbit.data.examples import Examples
from fourbit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PERCENTILES = (10, 50, 90, 99, 100)


@dataclass(frozen=True)
class Report:
    """What was read and what of it is used; all numbers are counts of rows unless they say otherwise.

    rows, dropped, cut, forms, parted  of the files in data.train, as in `Encoded`
    train_rows, heldout_rows           used on each side; examples and heldout_examples made of them
    tokens, trained_tokens             of the training examples
    lengths                            tokens of the training examples at percentiles 10, 50, 90, 99 and 100
    duplicates                         training rows whose text an earlier one has
    leaked                             held-out rows whose text a training row has
    leaked_nearly                      the same but for case, white space and punctuation
    heldout_dropped                    of files in data.heldout, reason to rows
    note                               what is made good in every conversation of this chat template, or ""
    """

    rows: int
    dropped: dict[str, int]
    cut: dict[str, int]
    forms: dict[str, int]
    parted: int
    train_rows: int
    heldout_rows: int
    examples: int
    heldout_examples: int
    tokens: int
    trained_tokens: int
    lengths: dict[str, int]
    duplicates: int
    leaked: int
    leaked_nearly: int
    heldout_dropped: dict[str, int]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str, bool]]:
        """(name, value, whether it deserves attention) for people."""
        forms = ", ".join(f"{form} {n:,}" if len(self.forms) > 1 else form for form, n in self.forms.items())
        lines = [
            ("rows read", f"{self.rows:,} ({forms})", False),
            ("used", f"{_rows(self.train_rows, self.examples)} to train, "
                     f"{_rows(self.heldout_rows, self.heldout_examples)} held out", False),
            ("dropped", _counts(self.dropped) or "none", bool(self.dropped)),
        ]  # fmt: skip
        if self.cut:
            lines.append(("cut", _counts(self.cut), True))
        if self.heldout_dropped:
            lines.append(("dropped, held out", _counts(self.heldout_dropped), True))
        share = 100 * self.trained_tokens / max(1, self.tokens)
        lengths = ", ".join(f"{length:,} ({name})" for name, length in self.lengths.items())
        lines += [
            ("tokens", f"{self.tokens:,}, of them trained {self.trained_tokens:,} ({share:.1f} %)", False),
            ("lengths", lengths, False),
            ("duplicates", f"{_are(self.duplicates, 'training row')} like another", self.duplicates > 0),
        ]
        if self.heldout_rows:
            leaked = f"{_are(self.leaked, 'held-out row')} trained on too"
            nearly = f", {self.leaked_nearly:,} more but for case, spaces and punctuation"
            lines.append(
                (
                    "leakage",
                    leaked + (nearly if self.leaked_nearly else ""),
                    self.leaked + self.leaked_nearly > 0,
                )
            )
        if self.parted:
            lines.append(("parted", f"{self.parted:,} of the rows give one example for each answer", False))
        if self.note:
            lines.append(("note", self.note, True))
        return lines


@dataclass(frozen=True)
class Prepared:
    """Examples to train and to evaluate on, what was read for the former, and the report."""

    train: Examples
    heldout: Examples
    encoded: Encoded
    report: Report


def prepare(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: Progress | None = None,
) -> Prepared:
    """Read, render, mask and split as the settings say; raises DataError for what cannot be trained."""
    encoded, counts = encode_files(settings.train, tokenizer, settings, progress)
    train, other = encoded.examples, None
    if settings.heldout:
        other, _ = encode_files(settings.heldout, tokenizer, settings, progress)
        heldout = other.examples
    else:
        train, heldout = split_rows(train, settings.heldout_fraction, seed)
    if settings.weights:
        entries = np.searchsorted(np.cumsum(counts), encoded.used["number"][train.rows], side="right")
        train = weighted(train, np.array(settings.weights)[entries].tolist(), seed)
    if settings.max_rows is not None:
        train = sample_rows(train, settings.max_rows, seed)
    if not train:
        raise DataError(f"{', '.join(settings.train)}: no row is left to train on; {encoded.summary()}")
    return Prepared(train, heldout, encoded, _report(encoded, other, train, heldout))


def _report(encoded: Encoded, other: Encoded | None, train: Examples, heldout: Examples) -> Report:
    trained_on = encoded.used[np.unique(train.rows)]
    evaluated = (other or encoded).used[np.unique(heldout.rows)]
    leaked = int(np.isin(evaluated["text"], trained_on["text"]).sum())
    lengths = np.sort(train.lengths).tolist()
    return Report(
        rows=encoded.rows,
        dropped=encoded.dropped,
        cut=encoded.cut,
        forms=encoded.forms,
        parted=encoded.parted,
        train_rows=len(trained_on),
        heldout_rows=len(evaluated),
        examples=len(train),
        heldout_examples=len(heldout),
        tokens=sum(lengths),
        trained_tokens=int(train.trained.sum()),
        lengths={_name(p): lengths[max(0, -(-p * len(lengths) // 100) - 1)] for p in _PERCENTILES},
        duplicates=len(trained_on) - len(np.unique(trained_on["text"])),
        leaked=leaked,
        leaked_nearly=int(np.isin(evaluated["normal"], trained_on["normal"]).sum()) - leaked,
        heldout_dropped=other.dropped if other is not None else {},
        note=encoded.note,
    )


def _name(percentile: int) -> str:
    return {50: "median", 100: "longest"}.get(percentile, f"{percentile} %")


def _rows(rows: int, examples: int) -> str:
    return f"{rows:,}" if rows == examples else f"{rows:,} (as {examples:,} examples)"


def _are(number: int, noun: str) -> str:
    return f"{number:,} {noun} is" if number == 1 else f"{number:,} {noun}s are"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())
