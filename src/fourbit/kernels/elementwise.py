"""Native functions that go over activations once: dropout, RMSNorm, gates, rotary embedding, cross-entropy.

Dropout and rotary embedding give the same bytes as `fourbit.reference`; the others sum and approximate in
their own way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit.kernels.native import DTYPES, address, check, library
from fourbit.kernels.pool import POOL


def dropout(x: Tensor, row: Tensor, position: Tensor, layer: int, seed: int, step: int, p: float) -> Tensor:
    """Drop elements of the contiguous x [T, K] with probability p and scale the kept ones.

    row and position are int64 [T]; the mask is a function of them, the column, layer, seed and step
    (see `reference.dropout_mask`), so calling this on the gradient is the backward pass.
    """
    y = POOL.empty(x.shape, x.dtype)
    status = library().fb_dropout(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        x.shape[1],
        row.contiguous().data_ptr(),
        position.contiguous().data_ptr(),
        layer,
        seed,
        step,
        p,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "dropout")
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x weight / sqrt(mean(x^2) + eps) of the contiguous x [T, K] with weight fp32 [K].

    Returns y in x's dtype, rounded once, and the factor of each row, fp32 [T], for backward.
    """
    return _norm(x, None, None, weight, eps)


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + more, rounded, and what `rms_norm` gives of it; both contiguous, [T, K], of one dtype."""
    total = POOL.empty(x.shape, x.dtype, stays=True)
    return total, *_norm(x, more, total, weight, eps)


def _norm(
    x: Tensor, more: Tensor | None, total: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    y = POOL.empty(x.shape, x.dtype, stays=more is not None)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    status = library().fb_rms_norm(
        x.data_ptr(),
        address(more),
        DTYPES[x.dtype],
        *x.shape,
        weight.data_ptr(),
        eps,
        address(total),
        y.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "rms_norm")
    return y, scale


def rms_norm_backward(
    grads: Sequence[Tensor], passed: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> Tensor:
    """The gradient in x of one to three of y, plus `passed`; all contiguous, [T, K], of one dtype."""
    grad_x = POOL.empty(x.shape, x.dtype)
    second, third = (address(grads[i]) if i < len(grads) else None for i in (1, 2))
    status = library().fb_rms_norm_grad(
        grads[0].data_ptr(),
        second,
        third,
        address(passed),
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.shape,
        weight.data_ptr(),
        scale.data_ptr(),
        grad_x.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "rms_norm_backward")
    return grad_x


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """activation(gate) * up of contiguous tensors of one shape and dtype; kind as in csrc/fourbit.h."""
    out = POOL.empty(gate.shape, gate.dtype)
    status = library().fb_gated(
        gate.data_ptr(),
        up.data_ptr(),
        DTYPES[gate.dtype],
        gate.numel(),
        kind,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "gated")
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """The gradients in gate and up."""
    grad_gate, grad_up = POOL.empty(gate.shape, gate.dtype), POOL.empty(up.shape, up.dtype)
    status = library().fb_gated_grad(
        grad.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        DTYPES[gate.dtype],
        gate.numel(),
        kind,
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "gated_backward")
    return grad_gate, grad_up


def rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """The heads of x [B, H, T, D], last dimension contiguous, turned by contiguous cos, sin [B or 1, T, D].

    All of one dtype. Returns [B, H, T, D], which lies in memory as [B, T, H, D]; `back`: the transposed map.
    """
    batch, heads, length, width = x.shape
    y = POOL.empty((batch, length, heads, width), x.dtype)
    status = library().fb_rotary(
        x.data_ptr(),
        DTYPES[x.dtype],
        batch,
        length,
        heads,
        width,
        x.stride(0),
        x.stride(2),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        0 if cos.shape[0] == 1 else length * width,
        int(back),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "rotary")
    return y.transpose(1, 2)


def cross_entropy(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    """-log softmax(cap(scale * logits))[label] of each row, fp32 [R]; cap(z) = softcap * tanh(z / softcap).

    logits    contiguous [R, V]; with `gradient` overwritten by the losses' gradients with respect to them
    labels    int64 [R], each a word
    """
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device="cpu")
    status = library().fb_cross_entropy(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        *logits.shape,
        labels.contiguous().data_ptr(),
        scale,
        softcap or 0.0,
        int(gradient),
        loss.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "cross_entropy")
    return loss
