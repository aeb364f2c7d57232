"""Products of rows that are sorted by expert with the experts' packed matrices, and their adapters'.

    y_i = x_i W_e^T + b_e + (x_i A_e^T) B_e^T        e: the expert of row i

One autograd function for all experts of a stack: it saves x and the rank-r products; each expert's matrix is
read again from its 4-bit bytes in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fourbit.kernels.product import Adapter
from fourbit.memory.tracker import has_values
from fourbit.nn.lowrank import adapter_gradients, adapter_product, base_gradient
from fourbit.nn.matrix import PackedMatrix


@dataclass(frozen=True)
class StackAdapter:
    """A low-rank term for each expert: a fp32 [E, r, in], b fp32 [E, out, r], scaling included."""

    a: Tensor
    b: Tensor

    def __add__(self, other: StackAdapter) -> StackAdapter:
        """Both together: one of the sum of their ranks."""
        return StackAdapter(torch.cat([self.a, other.a], dim=1), torch.cat([self.b, other.b], dim=2))


@dataclass(frozen=True)
class Routing:
    """Which rows go through which expert.

    order    int64 [T k], which place of the tokens' experts, flattened, a row sorted by expert is for
    inverse  int64 [T k], which of those rows is for a place
    counts   rows of each expert
    """

    order: Tensor
    inverse: Tensor
    counts: list[int]


def sorted_rows(x: Tensor, index: Tensor, experts: int) -> tuple[Tensor, Routing]:
    """Each token's row for each of its experts, sorted by expert: x [T, H], index int [T, k] -> [T k, H]."""
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    if has_values(index):
        counts = torch.bincount(flat, minlength=experts).tolist()
    else:  # as evenly as it goes
        counts = [(len(flat) + number) // experts for number in range(experts)]
    routing = Routing(order, order.argsort(), counts)
    rows: Tensor = _Dispatched.apply(x, routing, index.shape[-1])  # type: ignore[no-untyped-call]
    return rows, routing


def weighted_sum(y: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """The rows of `sorted_rows` at their tokens again, weighted [T, k] and summed: [T, H]."""
    rows: Tensor = _Reordered.apply(y, routing)  # type: ignore[no-untyped-call]
    return (rows.view(*weights.shape, -1) * weights[..., None]).sum(dim=1).to(y.dtype)


def grouped(
    x: Tensor, matrices: Sequence[PackedMatrix], counts: Sequence[int], adapter: StackAdapter | None
) -> Tensor:
    """x [R, in], so many rows for each matrix in turn -> [R, out], differentiable in x and the adapter."""
    a, b = (None, None) if adapter is None else (adapter.a, adapter.b)
    y: Tensor = _Grouped.apply(x, a, b, matrices, counts)  # type: ignore[no-untyped-call]
    return y


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        matrices: Sequence[PackedMatrix],
        counts: Sequence[int],
    ) -> Tensor:
        y = x.new_empty(len(x), matrices[0].out_features)
        low = None if a is None else x.new_empty(len(x), a.shape[1])
        for number, begin, end in _spans(x, counts):
            rows, base = x[begin:end], matrices[number]
            if a is None or b is None or low is None:
                y[begin:end] = base.forward(rows)
            else:
                y[begin:end], low[begin:end] = adapter_product(rows, base, _of(a, b, number))
        ctx.save_for_backward(x, low, a, b)
        ctx.matrices, ctx.counts = matrices, counts
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if needs[0] else None
        grad_a = torch.zeros_like(a) if needs[1] else None
        grad_b = torch.zeros_like(b) if needs[2] else None
        for number, begin, end in _spans(x, ctx.counts):
            rows, base = grad[begin:end], ctx.matrices[number]
            if a is None:
                if grad_x is not None:
                    grad_x[begin:end] = base_gradient(rows, base)
                continue
            read = partial(x.__getitem__, slice(begin, end))
            found = adapter_gradients(rows, read, low[begin:end], base, _of(a, b, number), needs)
            places: tuple[Any, ...] = (slice(begin, end), number, number)
            for whole, part, place in zip((grad_x, grad_a, grad_b), found, places, strict=True):
                if whole is not None and part is not None:
                    whole[place] = part
        return grad_x, grad_a, grad_b, None, None


def _spans(x: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of those that have rows; without values of one, since others are like it."""
    for number, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        if count:
            yield number, end - count, end
            if not has_values(x):
                return


def _of(a: Tensor, b: Tensor, number: int) -> Adapter:
    return Adapter(a[number].detach(), b[number].detach(), 1.0, None)


class _Dispatched(torch.autograd.Function):
    """x [T, H] -> [T k, H], sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing, k: int) -> Tensor:
        ctx.routing, ctx.k = routing, k
        return x[routing.order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[ctx.routing.inverse].view(-1, ctx.k, grad.shape[-1]).sum(dim=1), None, None


class _Reordered(torch.autograd.Function):
    """y [T k, H], sorted by expert -> the same rows at their places."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return y[routing.inverse]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[ctx.routing.order], None
