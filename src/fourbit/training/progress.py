"""What a person sees while a run goes on: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_PLAIN_EVERY_SECONDS = 15.0
#: Redraws a second: each takes time from the training that it shows.
_REDRAWS = 2
#: Columns that the line takes with its bar; a narrower terminal gets a shorter line.
_WIDE = 106


@dataclass(frozen=True)
class StepView:
    """The figures of one optimizer step; tokens_per_second and seconds_left are averages over the run."""

    step: int
    total: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float
    peak_bytes: int

    def text(self, wide: bool = True) -> str:
        """All figures in at most 73 characters, or 64 where the terminal is narrow."""
        parts = [
            f"loss {self.loss:.3f}",
            f"lr {self.learning_rate:.1e}",
            f"grad {self.grad_norm:.2f}",
            f"{self.tokens_per_second:,.0f} tok/s",
            f"{duration_text(self.seconds_left)} left",
            f"{'peak ' if wide else ''}{self.peak_bytes / 1e9:.2f} GB",
        ]
        return ("  " if wide else " ").join(parts)


class ProgressLine:
    """A context that shows steps as they finish."""

    def __init__(self, console: Console, total: int, done: int = 0) -> None:
        self._console = console
        self._total = total
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._printed = time.monotonic()
        if console.is_terminal:
            bar = [BarColumn(bar_width=20)] if console.width >= _WIDE else []
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                *bar,
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=console, refresh_per_second=_REDRAWS)
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, view: StepView) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=view.step, description=view.text(self._console.width >= _WIDE)
            )
        elif time.monotonic() - self._printed >= _PLAIN_EVERY_SECONDS or view.step in (1, self._total):
            self._printed = time.monotonic()
            self._console.print(
                f"step {view.step}/{view.total}  {view.text()}", highlight=False, soft_wrap=True
            )

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def duration_text(seconds: float) -> str:
    """M:SS, or H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
