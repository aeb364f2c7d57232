"""Modules that run our code in place of their class's: which do, and whether both compute the same."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

#: Width of the input on which a class is tried.
WIDTH = 16


def is_ours(forward: Any) -> bool:
    """Whether a module's own `forward` was put there by this package."""
    return isinstance(forward, MethodType) and forward.__func__.__module__.startswith("fourbit.nn.")


def runs_own_code(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward, or ours in its place, and nothing else."""
    forward = module.__dict__.get("forward")
    ours = forward is None or is_ours(forward)
    return ours and not module._forward_hooks and not module._forward_pre_hooks


def agrees(module: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], small: dict[str, Any]) -> bool:
    """Whether a forward gives what the module's class gives, with small parts in the place of its own.

    So the answer depends on the class alone, and the module's weights may lie anywhere or nowhere.
    """
    whole = {name: getattr(module, name) for name in small}
    x = random(2, 3, WIDTH)
    try:
        for name, part in small.items():
            setattr(module, name, part)
        with torch.no_grad():
            return torch.allclose(type(module).forward(module, x), forward(module, x), rtol=1e-5, atol=1e-5)
    finally:
        for name, part in whole.items():
            setattr(module, name, part)


def random(*shape: int) -> Tensor:
    """The same numbers for the same number of dimensions."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
