"""Products with a packed weight in Triton, which read the weight as it lies: in 4 bits.

What is restored is rounded to the rows' dtype, as if the whole weight had been, and sums are fp32, rounded
once. A product of a few rows is bound by reading the weight. One of many restores each tile of the weight for
every tile of rows anew; `benchmarks/gpu.py kernels` sets it beside restoring the weight first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.codebooks import dynamic_map
from fourbit.kernels.gpu.codec import NESTED, scale_of

#: Features that one program makes of one row, and of more; bytes of each that it reads at once.
_FEATURES_ONE, _FEATURES, _BYTES_ONE, _BYTES = 4, 32, 256, 64
#: The tiles of many rows.
MANY = {"ROWS": 128, "FEATURES": 128, "BYTES": 16}


def linear_4bit(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Multiply the contiguous x [M, K], M at most 64 and K even, by the packed [out_features, K] transposed.

    x and bias fp32, bf16 or fp16, alike. Returns x's dtype [M, out_features].
    """
    rows, width = x.shape
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    double, nested, mean = _double(absmax, nested_absmax, offset)
    one = rows == 1
    features, size = (_FEATURES_ONE, _BYTES_ONE) if one else (_FEATURES, _BYTES)
    _product[(triton.cdiv(out_features, features),)](
        x, codes.contiguous(), absmax.contiguous(), nested, mean, dynamic_map(x.device), codebook,
        y if bias is None else bias, y, rows, out_features, width // 2,
        block_size, double, bias is not None, one, max(16, triton.next_power_of_2(rows)), features, size,
        enable_fp_fusion=False,
    )  # fmt: skip
    return y


def many_rows(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Multiply the contiguous x [M, K], K even, of bf16 or fp16 as the bias, like `linear_4bit`."""
    rows, width = x.shape
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    double, nested, mean = _double(absmax, nested_absmax, offset)
    grid = (triton.cdiv(rows, MANY["ROWS"]), triton.cdiv(out_features, MANY["FEATURES"]))
    _many[grid](
        x, codes.contiguous(), absmax.contiguous(), nested, mean, dynamic_map(x.device), codebook,
        y if bias is None else bias, y, rows, out_features, width // 2, block_size, double, bias is not None,
        **MANY, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def _double(absmax: Tensor, nested: Tensor | None, offset: Tensor | None) -> tuple[bool, Tensor, Tensor]:
    """Whether scales are quantized, and what the kernels take then, or ignore."""
    return (False, absmax, absmax) if nested is None or offset is None else (True, nested, offset)


@triton.jit
def _product(
    x, codes, absmax, nested, offset, dynamic, codebook, bias, y, rows, features, width,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr, ONE: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """width: bytes of a feature. Even and odd columns of x meet the high and the low halves of bytes."""
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    start = feature.to(tl.int64) * width
    row = tl.arange(0, ROWS)
    single = tl.zeros((FEATURES, BYTES), tl.float32)
    several = tl.zeros((ROWS, FEATURES), tl.float32)
    for first in range(0, width, BYTES):
        column = first + tl.arange(0, BYTES)
        inside = (feature[:, None] < features) & (column[None, :] < width)
        place = start[:, None] + column[None, :]
        byte = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
        scale = scale_of(place * 2 // BLOCK, inside, absmax, nested, offset, dynamic, DOUBLE, NESTED)
        high = (tl.load(codebook + (byte >> 4)) * scale).to(x.dtype.element_ty)
        low = (tl.load(codebook + (byte & 15)) * scale).to(x.dtype.element_ty)
        if ONE:
            even = tl.load(x + 2 * column, mask=column < width, other=0.0).to(tl.float32)
            odd = tl.load(x + 2 * column + 1, mask=column < width, other=0.0).to(tl.float32)
            single += high.to(tl.float32) * even[None, :] + low.to(tl.float32) * odd[None, :]
        else:
            where = row[:, None].to(tl.int64) * (2 * width) + 2 * column[None, :]
            real = (row[:, None] < rows) & (column[None, :] < width)
            even = tl.load(x + where, mask=real, other=0.0)
            odd = tl.load(x + where + 1, mask=real, other=0.0)
            several = tl.dot(even, tl.trans(high), several, input_precision="ieee")
            several = tl.dot(odd, tl.trans(low), several, input_precision="ieee")
    if ONE:
        total = tl.sum(single, axis=1)
        if BIAS:
            total += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)
        tl.store(y + feature, total.to(y.dtype.element_ty), mask=feature < features)
    else:
        if BIAS:
            several += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
        where = row[:, None].to(tl.int64) * features + feature[None, :]
        real = (row[:, None] < rows) & (feature[None, :] < features)
        tl.store(y + where, several.to(y.dtype.element_ty), mask=real)


@triton.jit
def _many(
    x, codes, absmax, nested, offset, dynamic, codebook, bias, y, rows, features, width,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Programs that follow one another share a tile of the weight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    start = feature.to(tl.int64) * width
    line = row.to(tl.int64) * (2 * width)
    sums = tl.zeros((ROWS, FEATURES), tl.float32)
    for first in range(0, width, BYTES):
        byte_column = first + tl.arange(0, BYTES)
        inside = (feature[:, None] < features) & (byte_column[None, :] < width)
        place = start[:, None] + byte_column[None, :]
        byte = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
        scale = scale_of(place * 2 // BLOCK, inside, absmax, nested, offset, dynamic, DOUBLE, NESTED)
        high = (tl.load(codebook + (byte >> 4)) * scale).to(x.dtype.element_ty)
        low = (tl.load(codebook + (byte & 15)) * scale).to(x.dtype.element_ty)
        weight = tl.reshape(tl.join(high, low), (FEATURES, 2 * BYTES))
        column = 2 * first + tl.arange(0, 2 * BYTES)
        real = (row[:, None] < rows) & (column[None, :] < 2 * width)
        values = tl.load(x + line[:, None] + column[None, :], mask=real, other=0.0)
        sums = tl.dot(values, tl.trans(weight), sums)
    if BIAS:
        sums += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    where = row[:, None].to(tl.int64) * features + feature[None, :]
    real = (row[:, None] < rows) & (feature[None, :] < features)
    tl.store(y + where, sums.to(y.dtype.element_ty), mask=real)
