"""The 4-bit linear product and its gradient (QLoRA, arXiv:2305.14314, equation 5).

    y = x @ W.T + bias        dL/dx = dL/dy @ W        W restored from 4 bits, never differentiated

Few rows are multiplied with the packed weight as it lies in memory: such a product is bound by reading the
weight, which is a quarter the size. Many rows meet panels of W restored in the cache, with
instruction sets and dtypes that have such a product; else W is restored once into the workspace and the
product left to torch. Nothing but the packed parts is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit.errors import QuantizationError
from fourbit.kernels import codec as native_codec
from fourbit.kernels.product import Packed, few_rows, has_product, product_grad
from fourbit.kernels.product import product as native_product
from fourbit.ops.codec import check_float, check_parts, restored
from fourbit.ops.library import LIBRARY, define, runs_native, runs_triton
from fourbit.shapes import with_rounded_rows

#: Up to this many rows, Triton's kernels multiply with the packed weight.
FEW_ROWS_GPU = 64

_PRODUCTS = (torch.float32, torch.bfloat16)

_PARTS = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, Tensor codebook, int block_size"


def _check(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    features: int,
    bias: Tensor | None = None,
) -> None:
    check_float(x.dtype, "the input of a 4-bit product")
    if x.ndim == 0:
        raise QuantizationError("the input of a 4-bit product needs at least one dimension, it has none")
    check_parts(features * x.shape[-1], codes, absmax, nested, offset, block_size)
    if bias is not None and (bias.shape != (features,) or bias.dtype != x.dtype):
        raise QuantizationError(
            f"bias must have {features} values of {x.dtype}, it has shape {list(bias.shape)} and {bias.dtype}"
        )


def multiplies_panels(rows: Tensor, weights: int) -> bool:
    """Whether native code multiplies rows [M, ..] with panels of a packed weight of so many values."""
    some = rows.shape[0] > 0 and weights > 0
    return some and rows.dtype in _PRODUCTS and runs_native(rows) and has_product(rows.dtype)


def _packed(out_features: int, in_features: int, codes: Tensor, absmax: Tensor, *rest: Any) -> Packed:
    return Packed(out_features, in_features, codes.contiguous(), absmax.contiguous(), *rest)


def _linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    _check(x, codes, absmax, nested, offset, block_size, out_features, bias)
    in_features = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), in_features)
    if runs_native(x) and 0 < rows.shape[0] <= few_rows(x.dtype):
        y = native_codec.linear_4bit(
            rows.contiguous(), codes, absmax, nested, offset, codebook, block_size, out_features, bias
        )
    elif multiplies_panels(rows, out_features * in_features):
        weight = _packed(out_features, in_features, codes, absmax, nested, offset, codebook, block_size)
        y, _ = native_product(rows.contiguous(), weight, bias)
    elif runs_triton(x) and 0 < rows.shape[0] <= FEW_ROWS_GPU and in_features % 2 == 0 and out_features:
        from fourbit.kernels.gpu import product as gpu_product

        y = gpu_product.linear_4bit(
            rows.contiguous(), codes, absmax, nested, offset, codebook, block_size, out_features, bias
        )
    else:
        shape = (out_features, in_features)
        dense = restored(shape, x.dtype, codes, absmax, nested, offset, codebook, block_size)
        padded = with_rounded_rows(rows)
        y = padded @ dense.T if bias is None else torch.addmm(bias, padded, dense.T)
        y = y[: rows.shape[0]]
    return y.view(*x.shape[:-1], out_features)


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    _check(x, codes, absmax, nested, offset, block_size, out_features, bias)
    return x.new_empty([*x.shape[:-1], out_features])


define(f"linear_4bit(Tensor x, {_PARTS}, SymInt out_features, Tensor? bias) -> Tensor", _linear, _linear_fake)


def _linear_backward(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    in_features: int,
) -> Tensor:
    _check(grad, codes, absmax, nested, offset, block_size, in_features)
    rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
    if multiplies_panels(rows, in_features * grad.shape[-1]):
        features = grad.shape[-1]
        weight = _packed(features, in_features, codes, absmax, nested, offset, codebook, block_size)
        product, _, _ = product_grad(rows.contiguous(), weight)
        assert product is not None
    else:
        shape = (grad.shape[-1], in_features)
        dense = restored(shape, grad.dtype, codes, absmax, nested, offset, codebook, block_size)
        product = (with_rounded_rows(rows) @ dense)[: rows.shape[0]]
    return product.view(*grad.shape[:-1], in_features)


def _linear_backward_fake(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    in_features: int,
) -> Tensor:
    _check(grad, codes, absmax, nested, offset, block_size, in_features)
    return grad.new_empty([*grad.shape[:-1], in_features])


define(
    f"linear_4bit_backward(Tensor grad, {_PARTS}, SymInt in_features) -> Tensor",
    _linear_backward,
    _linear_backward_fake,
)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, absmax, nested, offset, codebook, ctx.block_size, _, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(codes, absmax, nested, offset, codebook)


def _differentiate_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        parts = ctx.saved_tensors
        grad_x = torch.ops.fourbit.linear_4bit_backward(grad, *parts, ctx.block_size, ctx.in_features)
    if ctx.needs_input_grad[8]:
        grad_bias = grad.sum_to_size(grad.shape[-1])
    return grad_x, None, None, None, None, None, None, None, grad_bias


torch.library.register_autograd(
    "fourbit::linear_4bit", _differentiate_linear, setup_context=_save_linear, lib=LIBRARY
)


def _save_linear_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, codes, absmax, nested, offset, codebook, ctx.block_size, _ = inputs
    ctx.out_features = grad.shape[-1]
    ctx.save_for_backward(codes, absmax, nested, offset, codebook)


def _differentiate_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    parts = ctx.saved_tensors
    again = torch.ops.fourbit.linear_4bit(grad, *parts, ctx.block_size, ctx.out_features, None)
    return again, None, None, None, None, None, None, None


torch.library.register_autograd(
    "fourbit::linear_4bit_backward",
    _differentiate_linear_backward,
    setup_context=_save_linear_backward,
    lib=LIBRARY,
)
