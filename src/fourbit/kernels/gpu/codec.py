"""Quantizing and restoring 4-bit tensors in Triton: the bytes of `fourbit.reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.codebooks import dynamic_map
from fourbit.tensor import NESTED_BLOCK_SIZE

#: Values that one program quantizes, or a whole block where that is larger; bytes that one restores.
_VALUES, _BYTES = 2048, 1024


def quantize_4bit(w: Tensor, thresholds: Tensor, order: Tensor, block_size: int, codes: Tensor) -> Tensor:
    """Quantize the contiguous w of n values with `codebooks.thresholds`: (fp32 [15], uint8 [16]).

    Fills codes, uint8 [ceil(n / 2)], and returns absmax, fp32 [ceil(n / block_size)]. The absmax of a block
    that holds a NaN or an infinity is not finite, and its codes mean nothing.
    """
    n = w.numel()
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    if n:
        blocks = max(1, _VALUES // block_size)
        grid = (triton.cdiv(n, blocks * block_size),)
        _quantize[grid](w, thresholds, order, codes, absmax, n, block_size, blocks, enable_fp_fusion=False)
    return absmax


@triton.jit
def _quantize(
    w, thresholds, order, codes, absmax, n, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    place = first + tl.arange(0, BLOCK * BLOCKS)
    value = tl.load(w + place, mask=place < n, other=0.0).to(tl.float32)
    value = tl.reshape(value, (BLOCKS, BLOCK))
    # A maximum passes over NaN.
    strange = tl.max((value != value).to(tl.int32), axis=1)
    largest = tl.max(tl.abs(value), axis=1)
    # As a bare constant it would be fp64: fp32's smallest normal number is above it.
    divisor = tl.maximum(largest, tl.full((BLOCKS,), 1e-38, tl.float32))
    block = first // BLOCK + tl.arange(0, BLOCKS)
    short = (block + 1) * BLOCK > n
    divided = tl.div_rn(value, tl.broadcast_to(divisor[:, None], (BLOCKS, BLOCK)))
    scaled = value * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor)[:, None]
    scaled = tl.where(short[:, None], divided, scaled)
    scaled = tl.minimum(tl.maximum(scaled, -1.0), 1.0)
    above = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for threshold in tl.static_range(15):
        above += (scaled > tl.load(thresholds + threshold)).to(tl.int32)
    code = tl.load(order + above)
    high, low = tl.split(tl.reshape(code, (BLOCKS * BLOCK // 2, 2)))
    byte = first // 2 + tl.arange(0, BLOCKS * BLOCK // 2)
    tl.store(codes + byte, (high << 4) | low, mask=byte < (n + 1) // 2)
    kept = tl.where(strange > 0, float("nan"), largest)
    tl.store(absmax + block, kept, mask=block * BLOCK < n)


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """Restore out.numel() values into the contiguous `out`, fp32, bf16 or fp16.

    absmax is fp32 [b], or uint8 [b] with nested_absmax fp32 [ceil(b / 256)] and offset fp32 [].
    """
    n = out.numel()
    if not n:
        return
    double = nested_absmax is not None
    nested, mean = (absmax, absmax) if nested_absmax is None or offset is None else (nested_absmax, offset)
    grid = (triton.cdiv((n + 1) // 2, _BYTES),)
    _dequantize[grid](
        codes.contiguous(), absmax.contiguous(), nested, mean, dynamic_map(codes.device), codebook, out, n,
        block_size, double, _BYTES, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def scale_of(
    block, mask, absmax, nested, offset, dynamic, DOUBLE: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """The fp32 scales of these blocks."""
    scale = tl.load(absmax + block, mask=mask, other=0)
    if DOUBLE:
        coarse = tl.load(nested + block // NESTED, mask=mask, other=0.0)
        scale = tl.load(dynamic + scale.to(tl.int32)) * coarse + tl.load(offset)
    return scale


@triton.jit
def _dequantize(
    codes, absmax, nested, offset, dynamic, codebook, out, n,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BYTES
    place = first + tl.arange(0, BYTES)
    inside = place < (n + 1) // 2
    byte = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    scale = scale_of(place * 2 // BLOCK, inside, absmax, nested, offset, dynamic, DOUBLE, NESTED)
    high = tl.load(codebook + (byte >> 4)) * scale
    low = tl.load(codebook + (byte & 15)) * scale
    value = tl.reshape(tl.join(high, low), (2 * BYTES,))
    where = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(out + where, value.to(out.dtype.element_ty), mask=where < n)


NESTED = tl.constexpr(NESTED_BLOCK_SIZE)
