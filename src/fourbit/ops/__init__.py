"""Operators in torch's registry, `torch.ops.fourbit.*`: importing this package defines them."""

from __future__ import annotations

from fourbit.ops import codec, dropout, linear

__all__ = ["codec", "dropout", "linear"]
