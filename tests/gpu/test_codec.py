"""Codes, scales and restored values are the reference's bytes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fourbit import reference
from fourbit.codebooks import codebook, thresholds
from fourbit.kernels.gpu import codec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weights(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random values; where there is room, some zeros and some of the smallest numbers."""
    w = torch.randn(count, generator=torch.Generator().manual_seed(count))
    w[100:300] = 0.0
    w[300:500] *= 1e-38
    return w.to(device, dtype)


def quantized(w: torch.Tensor, quant_type: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=w.device)
    values = codebook(quant_type, w.device)
    return codes, codec.quantize_4bit(w, *thresholds(values), block_size, codes)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 129, 1001, 4097])
def test_bytes_of_the_reference(quant_type: str, count: int, device: torch.device) -> None:
    values = codebook(quant_type, device)
    for dtype, block_size in product(FLOATS, (32, 64, 4096)):
        w = weights(count, dtype, device)
        codes, absmax = quantized(w, quant_type, block_size)
        wanted = reference.quantize_4bit(w, values, block_size)
        assert torch.equal(codes, wanted[0])
        assert torch.equal(absmax, wanted[1])
        double = reference.quantize_absmax(absmax)
        for scales, given in (
            (absmax, (absmax, None, None)),
            (reference.dequantize_absmax(*double), double),
        ):
            out = torch.empty(count, dtype=dtype, device=device)
            codec.dequantize_4bit(codes, *given, values, block_size, out)
            shape = (count,)
            assert torch.equal(
                out, reference.dequantize_4bit(codes, scales, shape, values, block_size, dtype)
            )


def test_ties_go_to_the_lower_value(device: torch.device) -> None:
    bounds, _ = thresholds(codebook("nf4"))
    for shift in (-torch.inf, 0.0, torch.inf):
        near = bounds if shift == 0 else torch.nextafter(bounds, torch.full_like(bounds, shift))
        w = torch.cat([torch.ones(1), near, -torch.ones(1)]).to(device)
        codes, _ = quantized(w, "nf4", 32)
        assert torch.equal(codes, reference.quantize_4bit(w, codebook("nf4", device), 32)[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_block_that_is_not_finite_says_so(wrong: float, device: torch.device) -> None:
    w = torch.ones(200, device=device)
    w[70] = wrong
    _, absmax = quantized(w, "nf4", 64)
    assert absmax.isfinite().tolist() == [True, False, True, True]


def test_nothing(device: torch.device) -> None:
    codes, absmax = quantized(torch.empty(0, device=device), "nf4", 64)
    assert (codes.numel(), absmax.numel()) == (0, 0)
    codec.dequantize_4bit(codes, absmax, None, None, codebook("nf4", device), 64, torch.empty(0))
