"""Products of a base layer together with a low-rank adapter, and their gradients, for autograd functions.

    y = x W^T + bias + s * dropout(x) A^T B^T        low = dropout(x) A^T

Where native code multiplies many rows with packed weights, the whole of it is one call forward and one
backward; else it is composed of products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fourbit import functional as F4
from fourbit.kernels.product import Adapter, Dropout, product_grad
from fourbit.memory.tracker import has_values
from fourbit.nn.matrix import PackedMatrix

Base = Any  # an nn.Linear, or a PackedMatrix that can be called
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _dropped(x: Tensor, keys: Dropout | None) -> Tensor:
    """x [T, K] times its mask; the mask is symmetric, so gradients pass through the same call."""
    if keys is None:
        return x
    return F4.keyed_dropout(
        x, keys.p, keys.row, keys.position, layer=keys.layer, seed=keys.seed, step=keys.step
    )


def adapter_product(x: Tensor, base: Base, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """y [T, N] and low [T, r] of x [T, K], not differentiable."""
    if isinstance(base, PackedMatrix) and base.adapts(x):
        results: tuple[Tensor, Tensor] = base(x, adapter)  # called, for hooks on the base
        return results
    return _composed_forward(x, base, adapter)


def adapter_gradients(
    grad: Tensor, x: Callable[[], Tensor], low: Tensor, base: Base, adapter: Adapter, needs: Sequence[bool]
) -> Gradients:
    """Gradients of x [T, K], A and B (those that it `needs`) from that of y [T, N]."""
    packed = isinstance(base, PackedMatrix) and base.adapts(grad)
    backward = _packed_backward if packed else _composed_backward
    return backward(grad, x, low, base, adapter, needs)


def _packed_backward(
    grad: Tensor,
    x: Callable[[], Tensor],
    low: Tensor,
    base: Any,
    adapter: Adapter,
    needs: Sequence[bool],
) -> Gradients:
    needs_adapter = needs[1] or needs[2]
    given = x().contiguous() if needs_adapter else None
    if not has_values(grad):
        grad_x = grad.new_empty(len(grad), base.in_features) if needs[0] else None
        return grad_x, torch.empty_like(adapter.a), torch.empty_like(adapter.b)
    return product_grad(
        grad.contiguous(),
        base.packed(),
        adapter,
        x=given,
        low=low,
        needs_x=needs[0],
        needs_adapter=needs_adapter,
    )


def _composed_forward(x: Tensor, base: Base, adapter: Adapter) -> tuple[Tensor, Tensor]:
    y = _base_product(x, base)  # [T, N]
    low = _dropped(x, adapter.dropout) @ adapter.a.to(x.dtype).t()  # [T, r]
    return y.addmm_(low, adapter.b.to(x.dtype).t(), alpha=adapter.scaling), low


def _composed_backward(
    grad: Tensor,
    x: Callable[[], Tensor],
    low: Tensor,
    base: Base,
    adapter: Adapter,
    needs: Sequence[bool],
) -> Gradients:
    a, b = adapter.a.to(grad.dtype), adapter.b.to(grad.dtype)
    grad_low = (grad @ b).mul_(adapter.scaling)  # [T, r]
    grad_b = (grad.t() @ low).to(adapter.b.dtype).mul_(adapter.scaling) if needs[2] else None
    grad_a = (grad_low.t() @ _dropped(x(), adapter.dropout)).to(adapter.a.dtype) if needs[1] else None
    grad_x = None
    if needs[0]:
        grad_x = base_gradient(grad, base)
        if adapter.dropout is None:
            grad_x.addmm_(grad_low, a)
        else:
            grad_x += _dropped(grad_low @ a, adapter.dropout)
    return grad_x, grad_a, grad_b


def _base_product(x: Tensor, base: Base) -> Tensor:
    if isinstance(base, PackedMatrix):
        y: Tensor = base(x)
        return y
    return F.linear(x, base.weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))


def base_gradient(grad: Tensor, base: Base) -> Tensor:
    """grad [T, N] @ W [N, K]."""
    if isinstance(base, PackedMatrix):
        return F4.linear_4bit_grad(grad, base.quantized())
    return grad @ base.weight.to(grad.dtype)
