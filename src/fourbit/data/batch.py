"""Examples to optimizer steps, steps to micro-batches, micro-batches to padded tensors.

Which rows share an optimizer step depends on seed, epoch and the examples' lengths alone. How a step is
cut into micro-batches is a matter of memory and speed: with a token-weighted loss it changes no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.data.examples import length_of
from fourbit.data.order import BATCHES, EPOCH, permutation
from fourbit.data.render import Example
from fourbit.shapes import rounded_size

#: The label of a token that carries no loss (torch's ignore_index).
NO_LOSS = -100

# Rows are sorted by length within pools of so many steps (fewer in small data, so that at least four pools
# keep the rows of a step changing from epoch to epoch); transformers uses the same two numbers.
_POOL_STEPS, _MIN_POOLS = 50, 4


@dataclass(frozen=True, slots=True)
class Batch:
    """B examples padded on the right to T tokens; every tensor is int64.

    input_ids       [B, T]
    attention_mask  [B, T]  1 for tokens, 0 for padding; None in packed batches, whose positions part the rows
    labels          [B, T]  the token AT each position where it is trained, else -100; the loss shifts
    position_ids    [B, T]  0 to T - 1
    rows            [B]     the examples' `row`; [1, T] in packed batches
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    position_ids: Tensor
    rows: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device),
            None if self.attention_mask is None else self.attention_mask.to(device),
            self.labels.to(device),
            self.position_ids.to(device),
            self.rows.to(device),
        )


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples into one batch. Labels come from the masks, whatever `pad_id` is.

    T is the longest example's length, rounded up (`fourbit.shapes`) so that few distinct ones occur.
    """
    shape = len(examples), rounded_size(max(len(example.input_ids) for example in examples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, NO_LOSS, dtype=torch.int64)
    for index, example in enumerate(examples):
        length = len(example.input_ids)
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        input_ids[index, :length] = ids
        attention_mask[index, :length] = 1
        labels[index, :length] = torch.where(torch.tensor(example.trained), ids, NO_LOSS)
    position_ids = torch.arange(shape[1]).expand(shape).contiguous()
    rows = torch.tensor([example.row for example in examples], dtype=torch.int64)
    return Batch(input_ids, attention_mask, labels, position_ids, rows)


def effective_batches(
    examples: Sequence[Example], effective_batch: int, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """The indices of each optimizer step of one epoch; every index once, the short step (if any) last.

    The order is a permutation keyed by seed and epoch. With `group_by_length`, rows of similar length
    share a step: the permutation is cut into pools, each pool sorted by length and cut into steps, and
    the full steps put into an order of their own.
    """
    order = permutation(len(examples), seed, EPOCH, epoch)
    if not group_by_length:
        return _cut(order, effective_batch)
    steps_per_pool = max(1, min(_POOL_STEPS, len(order) // (effective_batch * _MIN_POOLS)))
    batches: list[list[int]] = []
    for pool in _cut(order, effective_batch * steps_per_pool):
        batches += _cut(_longest_first(pool, examples), effective_batch)
    full = len(order) // effective_batch
    return [batches[index] for index in permutation(full, seed, BATCHES, epoch)] + batches[full:]


def micro_batches(indices: Sequence[int], examples: Sequence[Example], micro_batch: int) -> list[list[int]]:
    """The indices of one optimizer step in groups of at most `micro_batch` rows of similar length.

    The longest come first, so that a step that does not fit in memory fails at its beginning.
    """
    return _cut(_longest_first(indices, examples), micro_batch)


def _longest_first(indices: Sequence[int], examples: Sequence[Example]) -> list[int]:
    """Sorted by length; equal lengths keep their order."""
    return sorted(indices, key=lambda index: -length_of(examples, index))


def _cut(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
