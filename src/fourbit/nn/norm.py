"""RMS norm as one pass, with the residual sum before it where there is one.

A norm runs so where its class computes x weight / sqrt(mean(x^2) + eps), with weight or with 1 + weight; one
that is trained runs its own code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.nn.copies import with_copies
from fourbit.nn.remake import remakable
from fourbit.nn.replaced import WIDTH, agrees, is_ours, random, runs_own_code


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like an RMS norm."""
    parameters = list(module.named_parameters())
    return (
        type(module).__name__.endswith("RMSNorm")
        and [name for name, _ in parameters] == ["weight"]
        and parameters[0][1].ndim == 1
        and norm_eps(module) is not None
    )


def norm_eps(module: nn.Module) -> float | None:
    """The eps of a norm; None where it has none under a name that is known."""
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def norm_added(module: nn.Module) -> float | None:
    """What an RMS norm adds to its weight, 0 or 1; None for a module that is none."""
    forward = norm_forward(module) if is_norm(module) else ""
    return None if isinstance(forward, str) else _added(forward)


def norm_forward(module: Any) -> Callable[[nn.Module, Tensor], Tensor] | str:
    """The forward in place of a norm's own; a reason where its class computes something else."""
    for added in (0.0, 1.0):

        def forward(self: Any, hidden_states: Tensor, *, added: float = added) -> Tensor:
            if self.weight.requires_grad:
                own: Tensor = type(self).forward(self, hidden_states)
                return own
            return rms_norm(hidden_states, *_parts(self, added))

        weight = nn.Parameter(random(WIDTH), requires_grad=False)
        if agrees(module, forward, {"weight": weight}):
            return forward
    return "it is another norm"


def fused_norm(module: nn.Module) -> tuple[Tensor, float] | None:
    """Weight, fp32 [K], and eps of a norm that runs our code and that nobody trains or watches, else None."""
    forward: Any = module.__dict__.get("forward")
    if not is_ours(forward) or not runs_own_code(module) or module.weight.requires_grad:
        return None
    return _parts(module, _added(forward.__func__))


def _parts(module: Any, added: float) -> tuple[Tensor, float]:
    weight = module.weight.float()
    return weight + added if added else weight, norm_eps(module) or 0.0


def _added(forward: Any) -> float:
    return float(forward.__kwdefaults__["added"])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x weight / sqrt(mean(x^2) + eps) over the last dimension of x [.., K]; weight fp32 [K], no gradient."""
    rows: Tensor = _RmsNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps)  # type: ignore[no-untyped-call]
    return _remakable(rows.view(x.shape), x, weight, eps)


def sum_norm(
    x: Tensor, more: Tensor | None, weight: Tensor, eps: float, readers: int
) -> tuple[Tensor, Tensor]:
    """x + more (x where that is None), and `rms_norm` of it with copies for so many readers, 1 to 3."""
    if more is not None and more.dtype != x.dtype:  # of a trained embedding in fp32, under autocast
        x, more = x + more, None
    rows = (None if part is None else part.reshape(-1, x.shape[-1]) for part in (x, more))
    total, *results = _SumNorm.apply(*rows, weight, eps, readers)  # type: ignore[no-untyped-call]
    total = total.view(x.shape)
    y, *copies = (_remakable(result.view(x.shape), total, weight, eps) for result in results)
    return total, with_copies(y, copies)


def _remakable(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return remakable(y, partial(_norm_again, eps=eps), x, weight)


def _norm_again(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = torch.ops.fourbit.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)[0]
    return y.view(x.shape)


class _RmsNorm(torch.autograd.Function):
    """Of rows [T, K]: what a function returns as a view could not be changed in place by who gets it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y: Tensor
        y, scale = torch.ops.fourbit.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.fourbit.rms_norm_backward([grad], None, *ctx.saved_tensors), None, None


class _SumNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, eps: float, readers: int
    ) -> tuple[Tensor, ...]:
        if more is None:
            total, (y, scale) = x, torch.ops.fourbit.rms_norm(x, weight, eps)
        else:
            total, y, scale = torch.ops.fourbit.add_rms_norm(x, more, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.set_materialize_grads(False)
        ctx.added = more is not None
        return total, y, *(y.view_as(y) for _ in range(readers - 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_copies: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [part for part in of_copies if part is not None]
        if given:
            grad = torch.ops.fourbit.rms_norm_backward(given, grad, *ctx.saved_tensors)
        return grad, grad if ctx.added else None, None, None, None
