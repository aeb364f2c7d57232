"""Metrics of a run as JSON lines: what the settings determine in one file, what the clock does in another.

`metrics.jsonl` is the same, byte for byte, whenever the same run is repeated on the same machine;
`timing.jsonl` is not. TensorBoard and trackers get both.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fourbit.errors import ConfigError, TrainingError
from fourbit.training import durable
from fourbit.training.trackers import Trackers

_METRICS, _TIMING = "metrics.jsonl", "timing.jsonl"


class MetricsWriter:
    """Appends to the run folder's metric files; `done` steps are in them already."""

    def __init__(
        self, folder: Path, tensorboard: bool, done: int = 0, trackers: Trackers | None = None
    ) -> None:
        self._folder, self._trackers = folder, trackers
        #: What the steps and evaluations of earlier sessions took.
        self.seconds_before = _seconds_so_far(folder)
        # Unbuffered: a line that the disk refuses must not come back when the file is closed.
        with durable.disk_errors(str(folder)):
            self._metrics = (folder / _METRICS).open("ab", buffering=0)
            self._timing = (folder / _TIMING).open("ab", buffering=0)
        self._board = _open_tensorboard(folder, done) if tensorboard else None

    def write(self, step: int, deterministic: dict[str, Any], timing: dict[str, Any]) -> None:
        """One line in each file; step counts finished optimizer steps. Raises TrainingError if it cannot."""
        for file, fields in ((self._metrics, deterministic), (self._timing, timing)):
            if fields:
                line = json.dumps({"step": step, **fields}) + "\n"
                with durable.disk_errors(str(file.name)):
                    _write_whole(file.fileno(), line.encode())
        if self._board is not None:
            for name, value in {**deterministic, **timing}.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
        if self._trackers is not None:
            self._trackers.log(step, {**deterministic, **timing})

    def sync(self) -> int:
        """Wait until all lines are on the disk; returns the length of metrics.jsonl in bytes."""
        with durable.disk_errors(str(self._folder / _METRICS)):
            os.fsync(self._timing.fileno())
            os.fsync(self._metrics.fileno())
        return os.fstat(self._metrics.fileno()).st_size

    def close(self) -> None:
        self._metrics.close()
        self._timing.close()
        if self._board is not None:
            self._board.close()
        if self._trackers is not None:
            self._trackers.close()


def truncate(folder: Path, step: int, metrics_bytes: int) -> None:
    """Put the metric files back to where they were when a checkpoint was written.

    Raises TrainingError when metrics.jsonl has become shorter than it was.
    """
    path = folder / _METRICS
    size = path.stat().st_size if path.exists() else 0
    if size < metrics_bytes:
        raise TrainingError(
            f"{path}: holds {size:,} of the {metrics_bytes:,} bytes that the first {step:,} steps wrote; "
            "put the file back, or start anew with --overwrite"
        )
    if size > metrics_bytes:
        os.truncate(path, metrics_bytes)
    kept = [line for line in _timing(folder) if line["step"] <= step]
    durable.write_text(folder / _TIMING, "".join(f"{json.dumps(line)}\n" for line in kept))


def _seconds_so_far(folder: Path) -> float:
    return sum(line.get("seconds", 0.0) + line.get("heldout_seconds", 0.0) for line in _timing(folder))


def _timing(folder: Path) -> list[dict[str, Any]]:
    """What is readable of timing.jsonl: a crash may have cut its last line or left it blank."""
    path = folder / _TIMING
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _write_whole(descriptor: int, data: bytes) -> None:
    """A write may stop at the disk's last free byte and only the next one fail."""
    while data:
        data = data[os.write(descriptor, data) :]


def _open_tensorboard(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "train.tensorboard: TensorBoard is not installed; pip install tensorboard, or set it to false"
        ) from None
    # What an earlier session wrote after its last checkpoint is hidden: it is written again.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
