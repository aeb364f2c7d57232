"""A tensor of more than 2^31 values, where 32-bit indices would wrap. Needs 12 GB of memory."""

from __future__ import annotations

import pytest
import torch

from fourbit import functional as F4
from fourbit import reference
from fourbit.codebooks import codebook
from fourbit.errors import QuantizationError

NUMEL = 2**31 + 64 * 5 + 3
PERIOD = 3 * 2**20  # whole blocks, and not a power of two, so that a wrapped index finds other values


@pytest.mark.slow
def test_more_than_two_to_the_31_values() -> None:
    pattern = torch.randn(PERIOD).bfloat16()
    w = torch.empty(NUMEL, dtype=torch.bfloat16)
    for piece in w.split(PERIOD):
        piece.copy_(pattern[: piece.numel()])
    w[-1] = 7.0

    q = F4.quantize_4bit(w, double_quant=False)
    codes, absmax = reference.quantize_4bit(pattern, codebook("nf4"), 64)
    for piece in q.codes[:-2].split(PERIOD // 2):
        assert torch.equal(piece, codes[: piece.numel()])
    for piece in q.absmax[:-1].split(PERIOD // 64):
        assert torch.equal(piece, absmax[: piece.numel()])
    assert q.absmax[-1] == 7

    w = F4.dequantize_4bit(q)  # frees the original
    restored = reference.dequantize_4bit(codes, absmax, (PERIOD,), codebook("nf4"), 64, torch.bfloat16)
    for piece in w[:-3].split(PERIOD):
        assert torch.equal(piece, restored[: piece.numel()])
    assert w[-1] == 7

    w[-2] = torch.inf
    with pytest.raises(QuantizationError, match=rf"has inf at \[{NUMEL - 2}\]"):
        F4.quantize_4bit(w)
