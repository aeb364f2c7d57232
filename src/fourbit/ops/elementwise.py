"""RMS norm, gated activations, rotary embedding, and the gradients in their activations, each a single pass.

They are the passes between a decoder layer's matrix products. Written with torch's own operators each takes
several, of which autograd keeps most results; here backward needs the inputs and one number a row. Weights
get no gradient: a layer whose norm is trained keeps its own code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit import reference
from fourbit.errors import QuantizationError
from fourbit.kernels import elementwise as native_elementwise
from fourbit.ops.attention import by_token
from fourbit.ops.codec import check_float
from fourbit.ops.library import define, runs_native

#: The activations, by the number that the operators take.
ACTIVATIONS = ("silu", "gelu_tanh")
#: The widest head that the native rotary embedding turns.
MOST_TURNED = 1024


def _check_norm(x: Tensor, weight: Tensor) -> None:
    check_float(x.dtype, "the input of a norm")
    if x.ndim != 2 or weight.dtype != torch.float32 or weight.shape != x.shape[1:]:
        raise QuantizationError(
            f"a norm of x [T, K] needs weight fp32 [K]; x has shape {list(x.shape)} and weight "
            f"{list(weight.shape)} of {weight.dtype}"
        )


def _check_gated(gate: Tensor, up: Tensor, kind: int) -> None:
    check_float(gate.dtype, "a gate")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise QuantizationError(
            f"gate and up must be alike; they are {list(gate.shape)} of {gate.dtype} and "
            f"{list(up.shape)} of {up.dtype}"
        )
    if not 0 <= kind < len(ACTIVATIONS):
        raise QuantizationError(f"no activation {kind}; 0 is {ACTIVATIONS[0]}, 1 is {ACTIVATIONS[1]}")


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm(x, weight)
    if runs_native(x):
        return native_elementwise.rms_norm(x.contiguous(), weight.contiguous(), eps)
    return reference.rms_norm(x, weight, eps)


def _norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm(x, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    _check_norm(x, weight)
    if runs_native(x):
        return native_elementwise.rms_norm_backward(
            grad.contiguous(), x.contiguous(), weight.contiguous(), scale
        )
    return reference.rms_norm_backward(grad, x, weight, scale)


def _norm_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    _check_gated(gate, up, kind)
    if runs_native(gate):
        return native_elementwise.gated(gate.contiguous(), up.contiguous(), kind)
    return reference.gated(gate, up, kind)


def _gated_fake(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    _check_gated(gate, up, kind)
    return gate.new_empty(gate.shape)


def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    _check_gated(gate, up, kind)
    if runs_native(gate):
        return native_elementwise.gated_backward(grad.contiguous(), gate.contiguous(), up.contiguous(), kind)
    return reference.gated_backward(grad, gate, up, kind)


def _gated_backward_fake(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _check_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_float(x.dtype, "queries and keys")
    fits = x.ndim == 4 and x.shape[3] % 2 == 0 and cos.shape[1:] == (x.shape[2], x.shape[3])
    alike = cos.dtype == sin.dtype == x.dtype and cos.shape == sin.shape
    if not fits or not alike or cos.shape[0] not in (1, x.shape[0]):
        raise QuantizationError(
            "a rotary embedding of x [B, H, T, D], D even, needs cos, sin [B or 1, T, D] of its dtype; they "
            f"are {list(x.shape)} of {x.dtype}, {list(cos.shape)} of {cos.dtype}, "
            f"{list(sin.shape)} of {sin.dtype}"
        )


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    _check_rotary(x, cos, sin)
    if runs_native(x) and 0 < x.shape[3] <= MOST_TURNED and x.numel():
        x = x if x.stride(3) == 1 else x.contiguous()
        return native_elementwise.rotary(x, cos.contiguous(), sin.contiguous(), back)
    return by_token(reference.rotary(x, cos, sin, back))


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    _check_rotary(x, cos, sin)
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _norm, _norm_fake)
define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> Tensor",
    _norm_backward,
    _norm_backward_fake,
)
define("gated(Tensor gate, Tensor up, int kind) -> Tensor", _gated, _gated_fake)
define(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)",
    _gated_backward,
    _gated_backward_fake,
)
define("rotary(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _rotary, _rotary_fake)
