"""Going on after memory ran out in a step: what is given up, one thing at a time, until the step fits.

The same step is computed again, with the same rows and the same dropout. What is given up changes memory and
speed, and of the result the order of sums at most.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from fourbit.config import TrainSettings
from fourbit.memory.activations import ActivationTier, checkpoint_activations
from fourbit.memory.measure import release_free_memory
from fourbit.optim import PagedAdamW


class OutOfMemory(Exception):
    """A step did not fit; it has changed nothing. The text is the allocator's own first line."""


def reason_of(error: RuntimeError | MemoryError) -> str | None:
    """What an allocator says of itself in this error; None for an error of another kind."""
    text = (str(error).strip().splitlines() or ["there is no memory"])[0]
    ours = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return text if ours or "can't allocate memory" in text else None


def next_relief(settings: TrainSettings, on_cpu: bool) -> dict[str, Any] | None:
    """The settings to change next, the cheapest first; None where all has been given up."""
    rows = min(settings.micro_batch, settings.effective_batch)
    if settings.packing is None and rows > 1:
        return {"micro_batch": rows // 2}
    if not settings.activation_checkpointing:
        return {"activation_checkpointing": True}
    if settings.loss_chunk > 1:
        return {"loss_chunk": max(1, settings.loss_chunk // 4)}
    if settings.activation_tier == "device":
        return {"activation_tier": "disk" if on_cpu else "host"}
    return {"optimizer_memory": 0} if settings.optimizer_memory != 0 else None


def relieve(
    settings: TrainSettings,
    changes: dict[str, Any],
    base: PreTrainedModel,
    optimizer: PagedAdamW,
    tier: ActivationTier,
) -> TrainSettings:
    """Make a run's next steps take less, from what a step that failed has left behind on."""
    optimizer.zero_grad(set_to_none=True)
    if changes.get("activation_checkpointing"):
        checkpoint_activations(base)
    if "activation_tier" in changes:
        tier.use(changes["activation_tier"])
    if "optimizer_memory" in changes:
        optimizer.set_memory(changes["optimizer_memory"] << 20)
    release_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return settings.model_copy(update=changes)
