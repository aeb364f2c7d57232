"""Rotary position embedding as one pass over queries and one over keys.

transformers' attention modules call a function of their file, `apply_rotary_pos_emb`, of five of torch's
operators for queries and keys each, and more in backward, all of whose results fall to the C library's heap.
`rotary_forward` gives an attention module its own code with ours in that function's place: in that module,
not in transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.ops.elementwise import MOST_TURNED

_NAME = "apply_rotary_pos_emb"
#: Heads and width of the queries on which a function is tried.
_HEADS, _WIDTH = 2, 8


def calls_rotary(module: nn.Module) -> bool:
    """Whether a module's own code turns queries and keys through transformers' function."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and _NAME in code.co_names


def rotary_forward(module: nn.Module) -> Callable[..., Any] | str:
    """The forward of a module's class with our rotary embedding; a reason where theirs computes another."""
    own: Any = type(module).forward
    theirs = own.__globals__.get(_NAME)
    settings = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        return "it turns a part of each head only"
    if not callable(theirs) or not _agrees(theirs):
        return "its rotary embedding is another"
    names = {**own.__globals__, _NAME: _in_place_of(theirs), "__name__": __name__}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x2, x1) sin, the halves x1 and x2 of x [B, H, T, D] turned against each other.

    cos, sin  [B or 1, T, D], no gradient. Returns x's dtype, rounded once, in memory as [B, T, H, D].
    """
    y: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def _in_place_of(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        if rest or named or not (_fits(q, cos, sin) and _fits(k, cos, sin)):
            found: tuple[Tensor, Tensor] = theirs(q, k, cos, sin, *rest, **named)
            return found
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return apply_rotary_pos_emb


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    alike = x.dtype == cos.dtype == sin.dtype and x.is_floating_point()
    whole = x.ndim == 4 and cos.shape == sin.shape and cos.shape[1:] == (x.shape[2], x.shape[3])
    halves = x.shape[-1] % 2 == 0 and x.shape[-1] <= MOST_TURNED
    fixed = not cos.requires_grad and not sin.requires_grad
    return alike and whole and halves and fixed and cos.shape[0] in (1, x.shape[0])


def _agrees(theirs: Callable[..., Any]) -> bool:
    """Whether a function of this name turns queries and keys as ours does."""
    taken = inspect.signature(theirs).parameters.values()
    needed = [one.name for one in taken if one.default is one.empty]
    if needed != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, _HEADS, 3, _WIDTH, generator=generator)
    k = torch.randn(1, 1, 3, _WIDTH, generator=generator)
    angles = torch.randn(1, 3, _WIDTH // 2, generator=generator)
    cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))
    with torch.no_grad():
        try:
            found = theirs(q, k, cos, sin)
        except RuntimeError:  # it wants other shapes, as GPT-OSS's does, whose cos and sin are halves
            return False
        return all(
            torch.allclose(a, rotary(x, cos, sin), atol=1e-5) for a, x in zip(found, (q, k), strict=True)
        )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y: Tensor = torch.ops.fourbit.rotary(x, cos, sin, False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.fourbit.rotary(grad, *ctx.saved_tensors, True), None, None
