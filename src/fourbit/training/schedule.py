"""Learning rate over a run: linear warmup, then constant, linear or cosine decay."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """The rate of optimizer step `step`, counted from 0, of `total`.

    Warmup covers ceil(warmup_ratio * total) steps and never starts at zero, so that no step is wasted.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
