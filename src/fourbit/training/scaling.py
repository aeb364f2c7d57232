"""The factor on the loss that keeps gradients within fp16's range (Micikevicius et al., arXiv:1710.03740)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_FIRST, _GROWING_AFTER = 2.0**16, 2000  # torch.amp.GradScaler's


class LossScale:
    """A power of two, so that taking it off again changes no bit; 1 for dtypes that need none.

    Halved where gradients overflow, and the step computed again; doubled after 2,000 steps that went well.
    """

    def __init__(self, dtype: torch.dtype, state: dict[str, Any] | None = None) -> None:
        """dtype: of activations; state: to go on from, or none."""
        self._needed = dtype == torch.float16
        state = state or {"factor": _FIRST if self._needed else 1.0, "good": 0}
        self.factor: float = state["factor"]
        self._good: int = state["good"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"factor": self.factor, "good": self._good}

    def take_off(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the factor."""
        if self.factor != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.factor)

    def lower(self) -> bool:
        """After gradients that are not finite: whether to compute them again, with half the factor."""
        self._good = 0
        if self.factor <= 1.0:
            return False
        self.factor /= 2
        return True

    def count(self) -> None:
        """A step went well."""
        if self._needed:
            self._good += 1
            if self._good == _GROWING_AFTER:
                self.factor, self._good = 2 * self.factor, 0
