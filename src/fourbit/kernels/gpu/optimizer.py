"""One step of AdamW on many weights in one launch, in Triton: the bytes of `fourbit.reference`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.codebooks import dynamic_map, dynamic_thresholds
from fourbit.tensor import NESTED_BLOCK_SIZE

#: Weights of one program, a multiple of the weights that share a scale of 8-bit states.
_CHUNK = 1024

Piece = tuple[Tensor, ...]


def adamw(pieces: Sequence[Piece]) -> None:
    """(weight, grad, mean, square, coefficients) of each piece, as `reference.adamw` takes them."""
    table, numbers, segment, chunk = _table(pieces)
    _adamw[(len(segment),)](
        table, numbers, segment, chunk, table.shape[1], numbers.shape[1], _CHUNK, enable_fp_fusion=False
    )


def adamw_8bit(pieces: Sequence[Piece]) -> None:
    """(weight, grad, mean, mean_absmax, square, square_absmax, coefficients), as `reference.adamw_8bit`."""
    table, numbers, segment, chunk = _table(pieces)
    device = table.device
    _adamw_8bit[(len(segment),)](
        table, numbers, segment, chunk,
        dynamic_map(device), dynamic_map(device, False),
        dynamic_thresholds(device), dynamic_thresholds(device, False),
        table.shape[1], numbers.shape[1], NESTED_BLOCK_SIZE, _CHUNK // NESTED_BLOCK_SIZE,
        enable_fp_fusion=False,
    )  # fmt: skip


def _table(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Addresses and sizes int64 [S, ..], coefficients fp32 [S, 8]; piece and chunk of each program."""
    device = pieces[0][0].device
    counts = tuple(piece[0].numel() for piece in pieces)
    rows = [[part.data_ptr() for part in piece[:-1]] + [n] for piece, n in zip(pieces, counts, strict=True)]
    table = torch.tensor(rows, dtype=torch.int64)
    numbers = torch.stack([piece[-1] for piece in pieces])
    if device.type == "cuda":  # from pinned memory, so that the host does not wait
        table, numbers = (part.pin_memory().to(device, non_blocking=True) for part in (table, numbers))
    return table, numbers, *_programs(counts, device)


@lru_cache(maxsize=1024)
def _programs(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    chunks = [-(-count // _CHUNK) for count in counts]
    segment = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(chunks))
    chunk = torch.cat([torch.arange(count) for count in chunks])
    return segment.int().to(device), chunk.int().to(device)


@triton.jit
def _weights_of(table, place, inside):
    weights = tl.load(table).to(tl.pointer_type(tl.float32)) + place
    grads = tl.load(table + 1).to(tl.pointer_type(tl.float32)) + place
    return weights, tl.load(weights, mask=inside, other=0.0), tl.load(grads, mask=inside, other=0.0)


@triton.jit
def _updated(numbers, weight, grad, mean, square):
    """Weight, mean and square after a step; no product is fused with a sum."""
    mean = mean * tl.load(numbers + 1) + grad * tl.load(numbers + 2)
    square = square * tl.load(numbers + 3) + (grad * grad) * tl.load(numbers + 4)
    bottom = tl.sqrt_rn(square) * tl.load(numbers + 5) + tl.load(numbers + 6)
    weight = weight * tl.load(numbers) - tl.div_rn(mean, bottom) * tl.load(numbers + 7)
    return weight, mean, square


@triton.jit
def _adamw(
    table, numbers, segment, chunk, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    piece = tl.load(segment + program)
    table += piece * COLUMNS
    place = tl.load(chunk + program).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = place < tl.load(table + 4)
    weights, weight, grad = _weights_of(table, place, inside)
    means = tl.load(table + 2).to(tl.pointer_type(tl.float32)) + place
    squares = tl.load(table + 3).to(tl.pointer_type(tl.float32)) + place
    mean = tl.load(means, mask=inside, other=0.0)
    square = tl.load(squares, mask=inside, other=0.0)
    weight, mean, square = _updated(numbers + piece * NUMBERS, weight, grad, mean, square)
    tl.store(weights, weight, mask=inside)
    tl.store(means, mean, mask=inside)
    tl.store(squares, square, mask=inside)


@triton.jit
def _adamw_8bit(
    table, numbers, segment, chunk, signed_map, unsigned_map, signed_thresholds, unsigned_thresholds,
    COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    piece = tl.load(segment + program)
    table += piece * COLUMNS
    block = tl.load(chunk + program).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    count = tl.load(table + 6)
    inside, some = place < count, block * BLOCK < count
    weights, weight, grad = _weights_of(table, place, inside)
    means, mean_scales = _states_of(table + 2, place, block)
    squares, square_scales = _states_of(table + 4, place, block)
    mean = _unpacked(means, mean_scales, inside, some, signed_map)
    square = _unpacked(squares, square_scales, inside, some, unsigned_map)
    weight, mean, square = _updated(numbers + piece * NUMBERS, weight, grad, mean, square)
    tl.store(weights, weight, mask=inside)
    mean, square = tl.where(inside, mean, 0.0), tl.where(inside, square, 0.0)
    code, scale = _packed(mean, signed_thresholds)
    tl.store(means, code, mask=inside)
    tl.store(mean_scales, scale, mask=some)
    code, scale = _packed(square, unsigned_thresholds)
    # A square that is not zero is not rounded to zero.
    code = tl.maximum(code, (square > 0).to(tl.uint8))
    tl.store(squares, code, mask=inside)
    tl.store(square_scales, scale, mask=some)


@triton.jit
def _states_of(table, place, block):
    codes = tl.load(table).to(tl.pointer_type(tl.uint8)) + place
    return codes, tl.load(table + 1).to(tl.pointer_type(tl.float32)) + block


@triton.jit
def _unpacked(codes, scales, inside, some, values):
    code = tl.load(codes, mask=inside, other=0).to(tl.int32)
    return tl.load(values + code) * tl.load(scales, mask=some, other=0.0)[:, None]


@triton.jit
def _packed(value, thresholds):
    """The codes of [BLOCKS, BLOCK] values, which are the thresholds below each, and the blocks' scales."""
    scale = tl.max(tl.abs(value), axis=1)
    divisor = tl.maximum(scale, tl.full(scale.shape, 1e-38, tl.float32))
    divisor = tl.broadcast_to(divisor[:, None], value.shape)
    scaled = tl.div_rn(value, divisor)
    below = tl.zeros(value.shape, tl.int32)
    for bit in tl.static_range(8):
        step = 128 >> bit
        higher = tl.load(thresholds + (below + step - 1)) < scaled
        below += tl.where(higher, step, 0)
    return below.to(tl.uint8), scale
