"""Operators in torch's registry, `torch.ops.fourbit.*`: importing this package defines them."""

from __future__ import annotations

from fourbit.ops import codec, linear

__all__ = ["codec", "linear"]
