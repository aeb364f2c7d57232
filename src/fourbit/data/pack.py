"""Rows laid end to end in one sequence, instead of below one another with padding: packs, micro-batches.

Rows do not see each other: positions begin anew with each, and with no 2-D mask given transformers keeps
tokens apart wherever positions do not go on by one. Which rows share an optimizer step is decided before, so
packing changes memory and speed, never the result; dropout is keyed by row and position and stays the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from fourbit.data.batch import NO_LOSS, Batch
from fourbit.data.render import Example

#: Packed sequences are filled up to a multiple of so many tokens, so that fewer distinct lengths occur.
MULTIPLE = 8


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in packs of at most `capacity` tokens: longest first, each into the fullest pack it fits in.

    One longer than the capacity is a pack of its own. Ties go to the earlier index and the older pack, so
    the packs are a function of the lengths alone.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        if place < len(room):
            free, pack = room.pop(place)
        else:
            free, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        insort(room, (free - lengths[index], pack))
    return packs


def collate_packed(examples: Sequence[Example], pad_id: int) -> Batch:
    """The examples end to end as a batch of one sequence, without an attention mask.

    input_ids, labels, position_ids and rows are [1, T]. Padding after the last example has positions that
    make each of its tokens a sequence of its own.
    """
    total = packed_size([len(example.input_ids) for example in examples])
    input_ids = torch.full((1, total), pad_id, dtype=torch.int64)
    labels = torch.full((1, total), NO_LOSS, dtype=torch.int64)
    position_ids = torch.zeros((1, total), dtype=torch.int64)
    rows = torch.full((1, total), examples[-1].row, dtype=torch.int64)
    start = 0
    for example in examples:
        end = start + len(example.input_ids)
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        input_ids[0, start:end] = ids
        # The first label is dropped: the token before it is another row's.
        trained = torch.tensor([False, *example.trained[1:]])
        labels[0, start:end] = torch.where(trained, ids, NO_LOSS)
        position_ids[0, start:end] = torch.arange(end - start)
        rows[0, start:end] = example.row
        start = end
    return Batch(input_ids, None, labels, position_ids, rows)


def packed_size(lengths: Sequence[int]) -> int:
    """Tokens of the sequence that rows of these lengths make."""
    return -(-sum(lengths) // MULTIPLE) * MULTIPLE
