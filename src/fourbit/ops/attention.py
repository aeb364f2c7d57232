"""Causal attention over whole rows, and its gradients: nothing of size T x T is kept or ever whole.

What a query sees is one number, the first key: every query sees keys from there up to itself. Causal masks,
sliding windows, padding and packed rows are all of that form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit import reference
from fourbit.errors import QuantizationError
from fourbit.kernels import attention as native_attention
from fourbit.ops.codec import check_float
from fourbit.ops.library import define, runs_native

#: The widest head of the native kernel.
MOST_WIDTH = 256


def _check(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> None:
    check_float(q.dtype, "the queries of attention")
    alike = q.dtype == k.dtype == v.dtype and q.ndim == k.ndim == 4 and k.shape == v.shape
    if not alike or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
        raise QuantizationError(
            "attention needs q [B, H, T, D] and k, v [B, Hkv, T, D] of one dtype, H a multiple of Hkv; "
            f"they are {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if first.dtype != torch.int32 or first.shape != (q.shape[0], q.shape[2]):
        raise QuantizationError(
            f"attention needs first int32 [{q.shape[0]}, {q.shape[2]}], "
            f"it is {list(first.shape)} of {first.dtype}"
        )


def _attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _check(q, k, v, first)
    if runs_native(q) and 0 < q.shape[3] <= MOST_WIDTH and q.numel():
        return native_attention.attention(_rows(q), _rows(k), _rows(v), first.contiguous(), scale)
    o, lse = reference.attention(q, k, v, first, scale)
    return by_token(o), lse


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _check(q, k, v, first)
    batch, heads, length, width = q.shape
    o = q.new_empty(batch, length, heads, width).transpose(1, 2)
    return o, q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, first)
    if runs_native(q) and 0 < q.shape[3] <= MOST_WIDTH and q.numel():
        return native_attention.attention_backward(
            _rows(grad), _rows(q), _rows(k), _rows(v), _rows(o), lse.contiguous(), first.contiguous(), scale
        )
    found = reference.attention_backward(grad, q, k, v, o, lse, first, scale)
    return tuple(torch.empty_like(x).copy_(g) for x, g in zip((q, k, v), found, strict=True))  # type: ignore[return-value]


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def by_token(o: Tensor) -> Tensor:
    """Laid out in memory as [B, T, H, D]."""
    return o.transpose(1, 2).contiguous().transpose(1, 2)


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor first, float scale) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)
define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor first, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
