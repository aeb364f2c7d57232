"""The rows of an optimizer step as they are computed, and how much of that is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fourbit.config import TrainSettings
from fourbit.data.batch import Batch, collate, effective_batches, micro_batches
from fourbit.data.examples import length_of
from fourbit.data.pack import best_fit, collate_packed, packed_size
from fourbit.data.render import Example
from fourbit.shapes import rounded_size


@dataclass(frozen=True, slots=True)
class Fill:
    """What an epoch computes: how many sequences or micro-batches, their size in tokens, the rows' tokens."""

    batches: int
    computed: int
    tokens: int

    @property
    def share(self) -> float:
        """The part of the computed tokens that is no padding."""
        return self.tokens / max(1, self.computed)


def groups(rows: Sequence[int], examples: Sequence[Example], settings: TrainSettings) -> list[list[int]]:
    """Rows of one optimizer step that are computed at once: packs, or micro-batches of similar length."""
    if settings.packing is None:
        return micro_batches(rows, examples, settings.micro_batch)
    packs = best_fit([length_of(examples, row) for row in rows], settings.packing)
    return [[rows[index] for index in pack] for pack in packs]


def batch_of(group: Sequence[Example], pad_id: int, settings: TrainSettings) -> Batch:
    """One of `groups` as it is computed: end to end, or padded to the longest."""
    return (collate_packed if settings.end_to_end else collate)(group, pad_id)


def epoch_fill(examples: Sequence[Example], settings: TrainSettings) -> Fill:
    """Of the first epoch of a run with these settings."""
    size = packed_size if settings.end_to_end else _padded_size
    steps = effective_batches(examples, settings.effective_batch, settings.seed, 0, settings.group_by_length)
    found = [
        [length_of(examples, row) for row in group]
        for step in steps
        for group in groups(step, examples, settings)
    ]
    return Fill(len(found), sum(map(size, found)), sum(map(sum, found)))


def _padded_size(lengths: Sequence[int]) -> int:
    return len(lengths) * rounded_size(max(lengths))
