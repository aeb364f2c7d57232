"""Which dropout mask a token gets: a function of where the token is, not of when it is computed.

Masks come from a counter-based generator (Philox4x32-10, Salmon et al., SC 2011) keyed by seed,
optimizer step, training row, position in the row, layer and column. So micro-batch size, packing,
recomputation under activation checkpointing, and the number of processes leave them unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenKeys:
    """The identity of the T tokens that a forward pass sees, in the order of its flattened input.

    seed       of the run
    step       optimizer step, counted from 0
    rows       int64 [T], index of the training row
    positions  int64 [T], position inside the row
    """

    seed: int
    step: int
    rows: Tensor
    positions: Tensor


class KeySource:
    """Shared by all adapter layers of a model; the loop sets `current` before each micro-batch."""

    def __init__(self) -> None:
        self.current: TokenKeys | None = None

    def set(self, seed: int, step: int, rows: Tensor, position_ids: Tensor) -> None:
        """rows int64 [B], or [B, T] where packed, and position_ids int64 [B, T] of the next micro-batch."""
        by_token = rows if rows.ndim == 2 else rows[:, None].expand_as(position_ids)
        spread = by_token.reshape(-1).contiguous()
        self.current = TokenKeys(seed, step, spread, position_ids.reshape(-1).contiguous())

    def clear(self) -> None:
        self.current = None
