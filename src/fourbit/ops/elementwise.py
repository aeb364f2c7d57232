"""RMS norm with residual sums, gated activations, rotary embedding, and their gradients, each a single pass.

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
from fourbit.kernels.pool import POOL
from fourbit.ops.attention import by_token
from fourbit.ops.codec import check_float
from fourbit.ops.library import define, runs_native

#: The activations, by the number that the operators take.
ACTIVATIONS = ("silu", "gelu_tanh")
#: Gradients that a norm's backward adds up: of queries, keys and values.
MOST_GRADS = 3
#: The widest head that the native rotary embedding turns.
MOST_TURNED = 1024


def _check_norm(x: Tensor, weight: Tensor) -> None:
    check_float(x.dtype, "the input of a norm")
    if x.ndim != 2 or weight.dtype != torch.float32 or weight.shape != x.shape[1:]:
        raise QuantizationError(
            f"a norm of x [T, K] needs weight fp32 [K]; x has shape {list(x.shape)} and weight "
            f"{list(weight.shape)} of {weight.dtype}"
        )


def _check_alike(tensors: list[Tensor]) -> None:
    first = tensors[0]
    if any(t.shape != first.shape or t.dtype != first.dtype for t in tensors):
        kinds = ", ".join(f"{list(t.shape)} of {t.dtype}" for t in tensors)
        raise QuantizationError(f"what is added must be alike; there are {kinds}")


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


def _add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check_alike([x, more])
    _check_norm(x, weight)
    if runs_native(x):
        return native_elementwise.add_rms_norm(x.contiguous(), more.contiguous(), weight.contiguous(), eps)
    total = x + more
    return total, *reference.rms_norm(total, weight, eps)


def _add_norm_fake(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_norm_fake(x, weight, eps)


def _norm_backward(
    grads: list[Tensor], passed: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> Tensor:
    if not 1 <= len(grads) <= MOST_GRADS:
        raise QuantizationError(f"a norm's backward takes 1 to {MOST_GRADS} gradients, not {len(grads)}")
    _check_alike([x, *grads, *([] if passed is None else [passed])])
    _check_norm(x, weight)
    if runs_native(x):
        return native_elementwise.rms_norm_backward(
            [grad.contiguous() for grad in grads],
            None if passed is None else passed.contiguous(),
            x.contiguous(),
            weight.contiguous(),
            scale,
        )
    return reference.rms_norm_backward(grads, passed, x, weight, scale)


def _norm_backward_fake(
    grads: list[Tensor], passed: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> Tensor:
    return x.new_empty(x.shape)


def _add(x: Tensor, more: Tensor) -> Tensor:
    _check_alike([x, more])
    if runs_native(x) and x.is_contiguous() and more.is_contiguous():
        return torch.add(x, more, out=POOL.empty(tuple(x.shape), x.dtype, stays=True))
    return x + more


def _add_fake(x: Tensor, more: Tensor) -> Tensor:
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
    "add_rms_norm(Tensor x, Tensor more, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_norm,
    _add_norm_fake,
)
define(
    "rms_norm_backward(Tensor[] grads, Tensor? passed, Tensor x, Tensor weight, Tensor scale) -> Tensor",
    _norm_backward,
    _norm_backward_fake,
)
define("gated(Tensor gate, Tensor up, int kind) -> Tensor", _gated, _gated_fake)
define(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)",
    _gated_backward,
    _gated_backward_fake,
)
define("add(Tensor x, Tensor more) -> Tensor", _add, _add_fake)
define("rotary(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _rotary, _rotary_fake)
