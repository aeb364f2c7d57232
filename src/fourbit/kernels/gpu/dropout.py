"""Keyed dropout in Triton: the bytes of `fourbit.reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Groups of eight columns that one program drops from, of one token or of several.
_GROUPS = 256
_LOW32 = 0xFFFFFFFF


def dropout(x: Tensor, rows: Tensor, positions: Tensor, layer: int, seed: int, step: int, p: float) -> Tensor:
    """Drop elements of the contiguous x [T, K] with probability p and scale the kept ones.

    rows and positions are int64 [T]; the mask is a function of them, the column, layer, seed and step (see
    `reference.dropout_mask`), so calling this on the gradient is the backward pass.
    """
    tokens, columns = x.shape
    y = torch.empty_like(x)
    if not x.numel():
        return y
    dropped = int(p * 65536 + 0.5)
    factor = float(65536.0 / torch.tensor(65536.0 - dropped, dtype=torch.float32))
    key = ((seed ^ (seed >> 32)) & _LOW32) | ((step & _LOW32) << 32)
    key -= (key >> 63) << 64  # the same bits as a signed number
    groups = min(_GROUPS, triton.next_power_of_2(triton.cdiv(columns, 8)))
    each = _GROUPS // groups
    grid = (triton.cdiv(tokens, each), triton.cdiv(columns, 8 * groups))
    keys = rows.contiguous(), positions.contiguous()
    _dropout[grid](
        x, *keys, y, tokens, columns, key, layer & _LOW32, dropped, factor, each, groups,
        enable_fp_fusion=False,
    )  # fmt: skip
    return y


# The numbers change from call to call: kernels are not compiled for their values.
@triton.jit(do_not_specialize=["key", "layer", "dropped"])
def _dropout(
    x, rows, positions, y, tokens, columns, key, layer, dropped, factor,
    TOKENS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, TOKENS * GROUPS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + place // GROUPS
    group = tl.program_id(1) * GROUPS + place % GROUPS
    row = tl.load(rows + token, mask=token < tokens, other=0).to(tl.uint32)
    position = tl.load(positions + token, mask=token < tokens, other=0).to(tl.uint32)
    layers = tl.zeros((TOKENS * GROUPS,), tl.uint32) + layer.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, row, position, group.to(tl.uint32), layers)
    lane = tl.arange(0, 8)[None, :]
    first = tl.where(lane < 2, w0[:, None], w1[:, None])
    second = tl.where(lane < 6, w2[:, None], w3[:, None])
    word = tl.where(lane < 4, first, second).to(tl.uint32)
    half = (word >> (16 * (lane % 2)).to(tl.uint32)) & 0xFFFF
    column = group[:, None] * 8 + lane
    inside = (column < columns) & (token[:, None] < tokens)
    where = token[:, None] * columns + column
    value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(half.to(tl.int32) >= dropped, value * factor, 0.0)
    tl.store(y + where, kept.to(y.dtype.element_ty), mask=inside)
