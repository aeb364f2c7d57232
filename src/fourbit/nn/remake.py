"""Results that backward makes again instead of keeping them.

A decoder layer's largest intermediate results are cheap functions of others that are kept anyway: a gated
MLP's product of its gate and up, a norm's result of its input. Who makes such a result says how on the tensor
itself, and who would save it for backward saves the inputs, which others save too, and so costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Remake:
    """A tensor is function(*inputs), which has no gradient here; version is the tensor's when this held."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int


def remakable(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Note on a result, which must be function(*inputs) bit for bit, how to make it again; returns it."""
    if torch.is_grad_enabled():
        noted: Any = result
        noted.fourbit_remake = Remake(function, tuple(x.detach() for x in inputs), result._version)
    return result


def remake_of(tensor: Tensor) -> Remake | None:
    """How to make this very tensor again; None for one without a note, or changed in place since."""
    found: Remake | None = getattr(tensor, "fourbit_remake", None)
    return found if found is not None and found.version == tensor._version else None
