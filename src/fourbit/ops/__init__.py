"""Operators in torch's registry, `torch.ops.fourbit.*`: importing this package defines them."""

from __future__ import annotations

from fourbit.ops import attention, dropout, elementwise, linear, loss
from fourbit.ops.codec import find_nonfinite, restore_into
from fourbit.ops.workspace import workspace

__all__ = [
    "attention",
    "dropout",
    "elementwise",
    "find_nonfinite",
    "linear",
    "loss",
    "restore_into",
    "workspace",
]
