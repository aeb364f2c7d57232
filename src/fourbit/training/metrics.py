"""Metrics of a run as JSON lines: what the settings determine in one file, what the clock does in another.

`metrics.jsonl` is the same, byte for byte, whenever the same run is repeated on the same machine;
`timing.jsonl` is not. TensorBoard gets both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fourbit.errors import ConfigError


class MetricsWriter:
    """Appends to the run folder's metric files."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._timing = (folder / "timing.jsonl").open("a", encoding="utf-8")
        self._board = _open_tensorboard(folder) if tensorboard else None

    def write(self, step: int, deterministic: dict[str, Any], timing: dict[str, Any]) -> None:
        """One line in each file; step counts finished optimizer steps."""
        for file, fields in ((self._metrics, deterministic), (self._timing, timing)):
            if fields:
                file.write(json.dumps({"step": step, **fields}) + "\n")
                file.flush()
        if self._board is not None:
            for name, value in {**deterministic, **timing}.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._metrics.close()
        self._timing.close()
        if self._board is not None:
            self._board.close()


def truncate_after(folder: Path, step: int) -> None:
    """Drop lines past a step, before a run that resumes there writes them again."""
    for name in ("metrics.jsonl", "timing.jsonl"):
        path = folder / name
        if path.exists():
            lines = [
                line
                for line in path.read_text(encoding="utf-8").splitlines()
                if json.loads(line)["step"] <= step
            ]
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _open_tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "train.tensorboard: TensorBoard is not installed; pip install tensorboard, or set it to false"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))
