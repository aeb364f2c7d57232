"""Batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence


def length_batches(lengths: Sequence[int], tokens: int, rows: int | None = None) -> list[list[int]]:
    """Indices in batches of similar length, the longest first, of at most so many padded tokens and rows.

    A row longer than `tokens` has a batch of its own. The longest come first, so that what does not fit
    in memory fails at the beginning.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room == 0:
            batches.append([])
            room = max(1, tokens // max(1, lengths[index]))
            room = min(room, rows) if rows is not None else room
        batches[-1].append(index)
        room -= 1
    return batches
