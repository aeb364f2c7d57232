"""Double quantization: the exact nearest codes, an offset that is the same everywhere, and how far
bitsandbytes is from both.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourbit import codebooks, reference
from fourbit import functional as F4

SIZES = (1, 2, 255, 256, 257, 4096, 4097, 70_001)


def quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fourbit.quantize_absmax(absmax)


def scales(size: int) -> Tensor:
    """Like the scales of a Gaussian matrix in blocks of 64."""
    return torch.randn(size, 64).abs().amax(dim=1)


@pytest.mark.parametrize("size", SIZES)
def test_codes_are_the_exact_nearest(implementation: str, size: int) -> None:
    absmax = scales(size)
    codes, nested, offset = quantize(absmax)
    residual = absmax - offset
    padded = torch.nn.functional.pad(residual, (0, -size % 256)).view(-1, 256)
    assert torch.equal(nested, padded.abs().amax(dim=1))
    y = residual / nested.repeat_interleave(256)[:size].clamp(min=1e-38)
    best = (y.double()[:, None] - codebooks.dynamic_map().double()).abs().argmin(dim=1)
    assert torch.equal(codes.long(), best)
    restored = torch.ops.fourbit.dequantize_absmax(codes, nested, offset)
    expected = codebooks.dynamic_map()[best] * nested.repeat_interleave(256)[:size] + offset
    assert torch.equal(restored, expected)


@pytest.mark.parametrize("size", SIZES)
def test_same_bytes_as_the_reference(implementation: str, size: int) -> None:
    absmax = scales(size) * 10.0 ** torch.randint(-6, 6, (size,))
    for got, expected in zip(quantize(absmax), reference.quantize_absmax(absmax), strict=True):
        assert torch.equal(got, expected)


def test_offset_is_the_rounded_mean(implementation: str) -> None:
    absmax = scales(123_457) * 10.0 ** torch.randint(-3, 3, (123_457,))
    exact = absmax.double().sum() / absmax.numel()
    assert quantize(absmax)[2] == exact.float()


def test_offset_order_of_summation(implementation: str) -> None:
    # The definition, written out: halving trees over chunks of 4096, then over the sums of chunks.
    def tree(values: list[float]) -> float:
        while len(values) > 1:
            half = len(values) // 2
            values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
        return values[0]

    # Magnitudes so far apart that another order changes the fp64 sum, and so the fp32 mean.
    absmax = scales(3 * 4096) * 2.0 ** torch.randint(-40, 40, (3 * 4096,))
    absmax[1], absmax[4000] = 2.0**90, 2.0**60
    chunks = [tree(chunk.tolist()) for chunk in absmax.double().split(4096)]
    mean = tree(chunks + [0.0] * 4093) / absmax.numel()
    assert quantize(absmax)[2].item() == torch.tensor(mean, dtype=torch.float32).item()


def test_equal_scales_are_restored_exactly(implementation: str) -> None:
    for value in (0.0, 0.1, 3.3e38):
        absmax = torch.full((300,), value)
        codes, nested, offset = quantize(absmax)
        assert torch.equal(codes, torch.full((300,), 127, dtype=torch.uint8))  # the map's zero
        assert torch.equal(torch.ops.fourbit.dequantize_absmax(codes, nested, offset), absmax)


def test_zero_blocks_stay_zero(implementation: str) -> None:
    # A zero block's restored scale is not 0 in general; its codes are those of zero, so its weights are.
    for quant_type in codebooks.QUANT_TYPES:
        w = torch.randn(10, 64)
        w[3] = 0
        q = F4.quantize_4bit(w, quant_type, double_quant=True)
        assert F4.absmax_of(q)[3] != 0
        assert torch.equal(F4.dequantize_4bit(q)[3], torch.zeros(64))


def test_against_bitsandbytes(implementation: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(1024, 1024)
    codes, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    q = F4.quantize_4bit(w, double_quant=True)
    assert torch.equal(q.codes, codes.view(-1))
    assert abs(q.offset - state.offset) <= 1e-6 * state.offset
    # Given its own offset, bitsandbytes' codes are the nearest but for a few, a neighbour each: it finds
    # them in a table of 65,536 bins, and a midpoint may lie inside one. 18 to 32 over five seeds.
    absmax = F4.quantize_4bit(w).absmax
    residual = (absmax - state.offset).view(-1, 256)
    y = (residual / residual.abs().amax(dim=1, keepdim=True)).view(-1)
    exact = torch.bucketize(y, codebooks.dynamic_thresholds())
    wrong = (exact != state.absmax).sum().item()
    assert 0 < wrong <= 64, f"{wrong} of {exact.numel()}"
    assert (exact - state.absmax.long()).abs().max() <= 1
    # And given equal offsets, ours are exact.
    if q.offset == state.offset:
        assert torch.equal(q.absmax.long(), exact)


def test_a_scale_at_the_mean_stays_there(implementation: str) -> None:
    # bitsandbytes' table has zero and its neighbours in one bin, so that zero becomes 2.1e-5 of absmax.
    bnb = pytest.importorskip("bitsandbytes.functional")
    absmax = torch.tensor([3.0, 1.0] + [2.0] * 254)
    codes, nested, offset = quantize(absmax)
    assert codes.tolist() == [255, 0] + [127] * 254
    assert bnb.quantize_blockwise(absmax - offset, blocksize=256)[0].tolist()[2:] == [131] * 254
    restored = torch.ops.fourbit.dequantize_absmax(codes, nested, offset)
    assert torch.equal(restored[2:], absmax[2:])


def test_bits_per_weight(implementation: str) -> None:
    # Section 3: 4 + 8/64 + 32/(64 * 256) = 4.126953125, and the offset, from the bytes themselves.
    q = F4.quantize_4bit(torch.randn(4096, 1024).bfloat16(), double_quant=True)
    assert 8 * (q.nbytes - 4) / q.numel == 4.126953125
    assert round(q.bits_per_weight, 3) == 4.127
    assert F4.quantize_4bit(torch.randn(4096, 1024)).bits_per_weight == 4.5


def test_error_of_double_quantization_is_small(implementation: str) -> None:
    w = torch.randn(1024, 1024)
    once, twice = (
        (F4.dequantize_4bit(F4.quantize_4bit(w, double_quant=d)) - w).abs().mean() for d in (False, True)
    )
    assert 1 < twice / once < 1.003  # 1.0010 over three seeds
