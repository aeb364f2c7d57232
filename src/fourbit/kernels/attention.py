"""Native causal attention, forward and backward, in tiles: nothing of size T x T is kept."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from fourbit.kernels.native import DTYPES, check, library
from fourbit.kernels.pool import POOL


class _Strided(ctypes.Structure):
    """FbAttentionTensor of csrc/fourbit.h."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64))


class _Attention(ctypes.Structure):
    """FbAttention of csrc/fourbit.h."""

    _fields_ = (
        *((name, _Strided) for name in ("q", "k", "v", "o", "grad", "dq", "dk", "dv")),
        ("first", c_void_p),
        ("lse", c_void_p),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "length", "width")),
        ("scale", c_float),
        ("dtype", c_int),
    )


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention: q [B, H, T, D], k and v [B, Hkv, T, D] of one dtype, last dimensions contiguous.

    first: contiguous int32 [B, T]; query t sees keys first[t] to t. D is at most 256.
    Returns o [B, H, T, D], which lies in memory as [B, T, H, D], and the fp32 [B, H, T] that backward needs.
    """
    batch, heads, length, width = q.shape
    o = POOL.empty((batch, length, heads, width), q.dtype).transpose(1, 2)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device="cpu")
    problem = _problem(q, k, v, o, first, lse, scale)
    check(library().fb_attention(ctypes.addressof(problem), torch.get_num_threads()), "attention")
    return o, lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in q, k and v, of their shapes and strides."""
    grads = tuple(POOL.empty_like(x) for x in (q, k, v))
    problem = _problem(q, k, v, o, first, lse, scale)
    problem.grad, problem.dq, problem.dk, problem.dv = map(_strided, (grad, *grads))
    check(library().fb_attention_grad(ctypes.addressof(problem), torch.get_num_threads()), "attention")
    return grads[0], grads[1], grads[2]


def _problem(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, first: Tensor, lse: Tensor, scale: float
) -> _Attention:
    batch, heads, length, width = q.shape
    return _Attention(
        *map(_strided, (q, k, v, o)),
        *(_Strided() for _ in range(4)),
        first.data_ptr(),
        lse.data_ptr(),
        batch,
        heads,
        k.shape[1],
        length,
        width,
        scale,
        DTYPES[q.dtype],
    )


def _strided(x: Tensor) -> _Strided:
    return _Strided(x.data_ptr(), *x.stride()[:3])
