"""The 4-bit codec and product as functions: `from fourbit import functional as F4`.

    q = F4.quantize_4bit(w, quant_type="nf4", block_size=64, double_quant=True)
    w = F4.dequantize_4bit(q, dtype=torch.bfloat16)
    y = F4.linear_4bit(x, q, bias=None)                                 # differentiable in x

The rules are in `fourbit.reference`, the byte layout in `fourbit.tensor`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.codebooks import check_codebook
from fourbit.codebooks import codebook as builtin_codebook
from fourbit.errors import QuantizationError
from fourbit.ops import find_nonfinite  # importing the package defines torch.ops.fourbit
from fourbit.tensor import QuantizedTensor


def quantize_4bit(
    w: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    codebook: Tensor | None = None,
    name: str | None = None,
) -> QuantizedTensor:
    """Quantize a tensor of any shape to 4 bits (QLoRA, arXiv:2305.14314, section 3).

    w             fp32, bf16 or fp16; need not be contiguous
    quant_type    "nf4", "fp4" or "int4"; "custom" with a codebook of one's own
    block_size    values per scale: 32, 64, ..., 4096
    double_quant  quantize the scales too: 4.127 instead of 4.5 bits per weight at block size 64
    codebook      fp32 [16], largest magnitude 1, any order; makes quant_type "custom"
    name          what to call the tensor in errors

    Raises QuantizationError for NaN or infinity (with the name and the position), for another dtype or
    block size, and for an unknown quant_type.
    """
    if codebook is not None:
        quant_type, values = "custom", check_codebook(codebook).to(w.device)
    elif quant_type == "custom":
        raise QuantizationError("quant_type 'custom' needs a codebook; pass codebook=fp32 [16]")
    else:
        values = builtin_codebook(quant_type, w.device)
    w = w.detach()
    codes, absmax = torch.ops.fourbit.quantize_4bit(w, values, block_size)
    # The scales of a block with NaN or infinity are not finite: no second pass over the weights.
    if not absmax.isfinite().all():
        raise _not_finite(w, name)
    nested_absmax = offset = None
    if double_quant:
        absmax, nested_absmax, offset = torch.ops.fourbit.quantize_absmax(absmax)
    return QuantizedTensor(
        codes=codes,
        absmax=absmax,
        shape=tuple(w.shape),
        dtype=w.dtype,
        quant_type=quant_type,
        block_size=block_size,
        codebook=values,
        nested_absmax=nested_absmax,
        offset=offset,
    )


def _not_finite(w: Tensor, name: str | None) -> QuantizationError:
    flat = w.reshape(-1)
    first = find_nonfinite(flat)
    position = [int(i) for i in torch.unravel_index(torch.tensor(first), w.shape)] if w.ndim else []
    value = flat[first].item()
    return QuantizationError(
        f"{name or 'the tensor'} of shape {list(w.shape)} has {value} at {position}; "
        "a weight that is not finite cannot be quantized, repair the checkpoint"
    )


def dequantize_4bit(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Restore a tensor of q's shape in `dtype`, by default the original one."""
    w: Tensor = torch.ops.fourbit.dequantize_4bit(*parts_of(q), q.shape, dtype or q.dtype)
    return w


def absmax_of(q: QuantizedTensor) -> Tensor:
    """The block scales fp32 [b], restored if they are double-quantized."""
    if q.nested_absmax is None:
        return q.absmax
    absmax: Tensor = torch.ops.fourbit.dequantize_absmax(q.absmax, q.nested_absmax, q.offset)
    return absmax


def linear_4bit(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """Product of x [.., K] and q [N, K] transposed, plus bias [N]: [.., N] in x's dtype.

    Differentiable in x and bias. Under torch.autocast it computes and returns in autocast's dtype, as
    F.linear does.

    Up to 16 rows are multiplied with the packed weight; more restore the weight in x's dtype first. Both
    agree up to rounding.

    Raises QuantizationError if q is not a matrix or its columns are not x's.
    """
    if len(q.shape) != 2:
        raise QuantizationError(f"a linear weight has two dimensions, this one has shape {list(q.shape)}")
    if x.ndim == 0 or x.shape[-1] != q.shape[1]:
        raise QuantizationError(
            f"input of shape {list(x.shape)} does not fit a weight [{q.shape[0]}, {q.shape[1]}]; "
            f"its last dimension must be {q.shape[1]}"
        )
    # torch 2.11 cannot trace torch.amp.is_autocast_available; meta is the device that has no autocast.
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    y: Tensor = torch.ops.fourbit.linear_4bit(x, *parts_of(q), q.shape[0], bias)
    return y


def linear_4bit_grad(grad: Tensor, q: QuantizedTensor) -> Tensor:
    """Gradient of `linear_4bit` in its input: grad [.., N] times q [N, K], in grad's dtype."""
    grad_x: Tensor = torch.ops.fourbit.linear_4bit_backward(grad, *parts_of(q), q.shape[1])
    return grad_x


def keyed_dropout(
    x: Tensor, p: float, rows: Tensor, positions: Tensor, *, layer: int, seed: int, step: int
) -> Tensor:
    """Dropout of x [T, K] at rate p whose mask depends on nothing but its keys; differentiable in x.

    rows, positions  int64 [T]: training row and position in it of each token
    layer            number of the layer, modulo 2^32
    seed, step       of the run, and the optimizer step

    The mask is made again in backward, and the gradient passes through this very function, so code
    that differentiates by hand may call it on the gradient. The rate is rounded to 1 / 65536.
    """
    y: Tensor = torch.ops.fourbit.keyed_dropout(x, p, rows, positions, layer, seed, step)
    return y


def parts_of(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, int]:
    """What operators take of it: codes, absmax, nested_absmax, offset, codebook, block_size."""
    return q.codes, q.absmax, q.nested_absmax, q.offset, q.codebook, q.block_size
