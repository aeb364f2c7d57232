"""Watches losses and gradients: skips what is not finite, stops what does not recover, warns of spikes."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from fourbit.errors import TrainingError

_IN_A_ROW = 3
_HISTORY, _SPIKE, _SPIKE_AT_LEAST = 20, 3.0, 1.0  # steps, factor, nats


class Guard:
    """One verdict per optimizer step."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        """`state`: of the guard to go on from, or None for a fresh run."""
        state = state or {"bad": 0, "losses": []}
        self._bad: int = state["bad"]
        self._losses: deque[float] = deque(state["losses"], maxlen=_HISTORY)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: non-finite steps in a row, and the last losses."""
        return {"bad": self._bad, "losses": list(self._losses)}

    def check(self, step: int, loss: float, grad_norm: float, rows: list[str]) -> tuple[bool, str | None]:
        """(whether to apply the step, a warning or None); rows are `file:line` of the step's rows.

        Raises TrainingError at the third non-finite step in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._bad = 0
            return True, self._spike(step, loss)
        self._bad += 1
        what = "loss" if not math.isfinite(loss) else "gradient"
        named = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
        if self._bad >= _IN_A_ROW:
            raise TrainingError(
                f"step {step + 1}: {what} is not finite, the third step in a row (rows {named}); "
                "lower train.learning_rate, or set model.compute_dtype to float32"
            )
        return False, f"step {step + 1}: {what} is not finite, the step is skipped (rows {named})"

    def _spike(self, step: int, loss: float) -> str | None:
        usual = median(self._losses) if len(self._losses) == _HISTORY else math.inf
        self._losses.append(loss)
        if loss > max(_SPIKE * usual, usual + _SPIKE_AT_LEAST):
            times = f"{loss / usual:.1f} times the median of the last {_HISTORY} steps"
            return f"step {step + 1}: loss {loss:.3f} is {times}"
        return None
