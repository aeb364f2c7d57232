"""The metrics of a run folder as series over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fourbit.errors import TrainingError
from fourbit.limits import parse_json

#: (finished optimizer steps, value), by step.
Series = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Curves:
    """What a run wrote while it trained; values that are not finite are left out and counted.

    train, heldout       loss in nats per trained token
    learning_rate        of each step
    grad_norm            before clipping
    tokens_per_second    of each step by itself
    peak_bytes           the highest so far
    seconds              of all steps and evaluations together
    not_finite           steps whose loss or gradient was not finite
    """

    train: Series
    heldout: Series
    learning_rate: Series
    grad_norm: Series
    tokens_per_second: Series
    peak_bytes: Series
    seconds: float
    not_finite: int

    @property
    def steps(self) -> int:
        """The last step that trained or was evaluated; 0 of none."""
        return max((series[-1][0] for series in (self.train, self.heldout) if series), default=0)


def read_curves(folder: Path) -> Curves:
    """The curves of a run folder. Raises TrainingError when its metrics are missing or damaged."""
    metrics, timing = _lines(folder / "metrics.jsonl"), _lines(folder / "timing.jsonl")
    losses = _series(metrics, "loss")
    steps = sum("loss" in line for line in metrics)
    norms = _series(metrics, "grad_norm")
    return Curves(
        train=losses,
        heldout=_series(metrics, "heldout_loss"),
        learning_rate=_series(metrics, "learning_rate"),
        grad_norm=norms,
        tokens_per_second=_rates(metrics, timing),
        peak_bytes=_series(timing, "peak_bytes"),
        seconds=sum(line.get("seconds", 0.0) + line.get("heldout_seconds", 0.0) for line in timing),
        not_finite=steps - len({step for step, _ in losses} & {step for step, _ in norms}),
    )


def smooth(series: Series, width: int) -> Series:
    """Each value replaced by the mean of the `width` values around it, fewer at the ends."""
    half = width // 2
    values = [value for _, value in series]
    return [
        (step, fmean(values[max(0, index - half) : index + half + 1]))
        for index, (step, _) in enumerate(series)
    ]


def thin(series: Series, count: int) -> Series:
    """At most about `count` points: means over neighbouring steps, at the last of them."""
    if len(series) <= count:
        return list(series)
    parts = [series[len(series) * part // count : len(series) * (part + 1) // count] for part in range(count)]
    return [(part[-1][0], fmean(value for _, value in part)) for part in parts]


def mean_of(all_series: Sequence[Series]) -> Series:
    """The mean over several series at the steps that all of them have."""
    found = [dict(series) for series in all_series]
    shared = set.intersection(*(set(series) for series in found)) if found else set()
    return [(step, fmean(series[step] for series in found)) for step in sorted(shared)]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a run that has trained a step"
        ) from None
    except UnicodeDecodeError:
        raise TrainingError(f"{path}: not text; restore it from a backup") from None
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            values = {"step": 0, **parse_json(line)}
            if any(not isinstance(value, int | float) for value in values.values()):
                raise ValueError("not a number")
            found.append(values)
        except (ValueError, TypeError):
            raise TrainingError(f"{path}:{number}: not a line of metrics; repair or remove it") from None
    return found


def _series(lines: Iterable[dict[str, Any]], key: str) -> Series:
    return [(line["step"], line[key]) for line in lines if key in line and math.isfinite(line[key])]


def _rates(metrics: list[dict[str, Any]], timing: list[dict[str, Any]]) -> Series:
    """Tokens of each step over its seconds; timing.jsonl itself holds the average since the run began."""
    seconds = {line["step"]: line["seconds"] for line in timing if "seconds" in line}
    tokens = [(line["step"], line["tokens"]) for line in metrics if "tokens" in line]
    before = [0, *(count for _, count in tokens)]
    return [
        (step, (count - earlier) / seconds[step])
        for (step, count), earlier in zip(tokens, before, strict=False)
        if seconds.get(step, 0) > 0
    ]
