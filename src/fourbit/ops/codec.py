"""Operators of the codec: quantize and restore 4-bit tensors and their scales.

A 4-bit tensor travels through operators as its parts: `codes` uint8 [ceil(n / 2)], then the scales,
which are either `absmax` fp32 [b] alone or, double-quantized, `absmax` uint8 [b] with `nested_absmax`
fp32 [ceil(b / 256)] and `offset` fp32 []; then `codebook` fp32 [16] and `block_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fourbit import reference
from fourbit.codebooks import check_block_size, thresholds
from fourbit.errors import QuantizationError
from fourbit.kernels import codec as native_codec
from fourbit.ops.library import define, runs_native, runs_triton
from fourbit.ops.workspace import allocate, workspace
from fourbit.tensor import NESTED_BLOCK_SIZE

#: Dtypes that weights and activations may have.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_float(dtype: torch.dtype, what: str) -> None:
    """Raise QuantizationError unless dtype is fp32, bf16 or fp16."""
    if dtype not in FLOATS:
        raise QuantizationError(f"{what} is {dtype}; convert it to float32, bfloat16 or float16")


def check_parts(
    numel: int, codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, block_size: int
) -> None:
    """Raise QuantizationError unless the parts of a 4-bit tensor of `numel` values fit each other."""
    check_block_size(block_size)
    blocks = -(-numel // block_size)
    _check_part("codes", codes, torch.uint8, (numel + 1) // 2)
    if nested is None:
        _check_part("absmax", absmax, torch.float32, blocks)
        return
    if offset is None:
        raise QuantizationError("double-quantized scales have nested_absmax but no offset; pass both")
    _check_part("absmax", absmax, torch.uint8, blocks)
    _check_part("nested_absmax", nested, torch.float32, -(-blocks // NESTED_BLOCK_SIZE))
    _check_part("offset", offset, torch.float32, 1)


def _check_part(name: str, part: Tensor, dtype: torch.dtype, size: int) -> None:
    if part.dtype != dtype or part.numel() != size:
        raise QuantizationError(
            f"{name} has {part.numel()} values of {part.dtype} where the tensor's shape and block size "
            f"need {size} of {dtype}; take codes, scales and shape from one quantized tensor"
        )


def _quantize(w: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    check_float(w.dtype, "the tensor to quantize")
    check_block_size(block_size)
    if not (runs_native(w) or runs_triton(w)):
        return reference.quantize_4bit(w, codebook, block_size)
    codes = allocate(((w.numel() + 1) // 2,), torch.uint8, w.device)
    if runs_native(w):
        return codes, native_codec.quantize_4bit(w.contiguous(), *thresholds(codebook), block_size, codes)
    from fourbit.kernels.gpu import codec as gpu_codec

    return codes, gpu_codec.quantize_4bit(w.contiguous(), *thresholds(codebook), block_size, codes)


def _quantize_fake(w: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    check_float(w.dtype, "the tensor to quantize")
    check_block_size(block_size)
    codes = w.new_empty([(w.numel() + 1) // 2], dtype=torch.uint8)
    return codes, w.new_empty([-(-w.numel() // block_size)], dtype=torch.float32)


define(
    "quantize_4bit(Tensor w, Tensor codebook, int block_size) -> (Tensor, Tensor)", _quantize, _quantize_fake
)


def find_nonfinite(w: Tensor) -> int:
    """Flat position of the first NaN or infinity of w, or -1. Not an operator: it decides in Python."""
    check_float(w.dtype, "the tensor to search")
    return native_codec.find_nonfinite(w.contiguous()) if runs_native(w) else reference.find_nonfinite(w)


def restore_into(
    out: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
) -> Tensor:
    """Restore a 4-bit tensor into the contiguous `out`, whose shape and dtype are the wanted ones."""
    check_parts(out.numel(), codes, absmax, nested, offset, block_size)
    check_float(out.dtype, "the wanted dtype")
    if runs_native(codes):
        native_codec.dequantize_4bit(codes, absmax, nested, offset, codebook, block_size, out)
    elif runs_triton(codes):
        from fourbit.kernels.gpu import codec as gpu_codec

        gpu_codec.dequantize_4bit(codes, absmax, nested, offset, codebook, block_size, out)
    else:
        scales = absmax if nested is None or offset is None else _dequantize_absmax(absmax, nested, offset)
        out.copy_(reference.dequantize_4bit(codes, scales, out.shape, codebook, block_size, out.dtype))
    return out


def restored(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
) -> Tensor:
    """Restore a 4-bit tensor into this thread's workspace; valid until the workspace is next used."""
    out = workspace(shape, dtype, codes.device)
    return restore_into(out, codes, absmax, nested, offset, codebook, block_size)


def _dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = allocate(tuple(shape), dtype, codes.device)
    return restore_into(out, codes, absmax, nested, offset, codebook, block_size)


def _dequantize_fake(
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    check_parts(prod(shape), codes, absmax, nested, offset, block_size)
    check_float(dtype, "the wanted dtype")
    return codes.new_empty(shape, dtype=dtype)


define(
    "dequantize_4bit(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, Tensor codebook, "
    "int block_size, SymInt[] shape, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_part("absmax", absmax, torch.float32, absmax.numel())
    return (native_codec if runs_native(absmax) else reference).quantize_absmax(absmax.contiguous())


def _quantize_absmax_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nested = absmax.new_empty([-(-absmax.numel() // NESTED_BLOCK_SIZE)])
    return torch.empty_like(absmax, dtype=torch.uint8), nested, absmax.new_empty([])


define("quantize_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)", _quantize_absmax, _quantize_absmax_fake)


def _dequantize_absmax(codes8: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    _check_part("nested_absmax", nested_absmax, torch.float32, -(-codes8.numel() // NESTED_BLOCK_SIZE))
    _check_part("offset", offset, torch.float32, 1)
    implementation = native_codec if runs_native(codes8) else reference
    return implementation.dequantize_absmax(codes8, nested_absmax, offset)


def _dequantize_absmax_fake(codes8: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(codes8, dtype=torch.float32)


define(
    "dequantize_absmax(Tensor codes8, Tensor nested_absmax, Tensor offset) -> Tensor",
    _dequantize_absmax,
    _dequantize_absmax_fake,
)
