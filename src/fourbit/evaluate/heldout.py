"""Held-out loss, every trained token counted once, whatever batch it stands in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fourbit.data.batch import collate
from fourbit.data.examples import lengths_of
from fourbit.data.render import Example
from fourbit.defaults import LOSS_CHUNK
from fourbit.errors import DataError
from fourbit.evaluate.batching import length_batches
from fourbit.evaluate.context import evaluating
from fourbit.nn.loss import causal_lm_loss, row_losses
from fourbit.processes import ALONE, Processes

#: Padded tokens per forward pass: enough to keep two cores at their matrix-multiply rate, few enough to
#: stay below the memory of a training step.
TOKENS_PER_BATCH = 2048


@dataclass(frozen=True, slots=True)
class HeldoutLoss:
    """loss: nats per trained token; tokens: how many of them were scored."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def heldout_loss(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    chunk: int = LOSS_CHUNK,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> HeldoutLoss:
    """Mean loss over the trained tokens of all examples, and their number.

    Examples are batched by length; chunk is as in `causal_lm_loss`; `progress(done, total)` counts examples;
    several processes share the batches, and all get the result.
    Raises DataError if no token of them is trained.
    """
    device = next(model.parameters()).device
    batches = length_batches(lengths_of(examples), tokens_per_batch)
    losses, counts, done = [0.0] * len(batches), [0.0] * len(batches), 0
    # Not inference_mode: this runs between training steps, which may meet what it leaves in caches.
    with evaluating(model), torch.no_grad():
        for place, indices, counted in processes.turns(batches):
            batch = collate([examples[index] for index in indices], pad_id).to(device)
            loss, tokens = causal_lm_loss(model, batch, chunk)
            if counted:
                losses[place], counts[place], done = float(loss), float(tokens), done + len(indices)
            if progress is not None:
                progress(done, len(examples))
    total, count = sum(processes.merged(losses)), round(sum(processes.merged(counts)))
    if count == 0:
        raise DataError(
            "no token of the held-out rows is trained, so there is no loss; give rows with answers"
        )
    return HeldoutLoss(total / count, count)


@dataclass(frozen=True, slots=True)
class RowLoss:
    """loss: nats, summed over the row's trained tokens; tokens: how many."""

    loss: float
    tokens: int


def example_losses(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> list[RowLoss]:
    """The loss of each example, in their order; summed they give `heldout_loss` up to rounding."""
    device = next(model.parameters()).device
    found: dict[int, RowLoss] = {}
    with evaluating(model), torch.no_grad():
        for indices in length_batches(lengths_of(examples), tokens_per_batch):
            batch = collate([examples[index] for index in indices], pad_id).to(device)
            for index, loss, tokens in zip(indices, *row_losses(model, batch), strict=True):
                found[index] = RowLoss(loss, tokens)
            if progress is not None:
                progress(len(found), len(examples))
    return [found[index] for index in range(len(examples))]


def total_loss(losses: Sequence[RowLoss]) -> HeldoutLoss:
    """The token-weighted mean. Raises DataError if no token is trained."""
    count = sum(row.tokens for row in losses)
    if count == 0:
        raise DataError("no token of the rows is trained, so there is no loss; give rows with answers")
    return HeldoutLoss(math.fsum(row.loss for row in losses) / count, count)
