"""The C++ codec: equal bytes for every instruction set and number of threads, and what is stored."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from fourbit import reference
from fourbit.codebooks import codebook, thresholds
from fourbit.kernels import codec as native_codec
from fourbit.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native library: {native.load_error()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# More than the 65,536 values that one task takes, and a tail that fills no block, vector or byte.
SIZE = 3 * 65_536 + 4096 + 77


@cache
def blocks_of_every_kind(dtype: torch.dtype) -> Tensor:
    """Normal values, with zero, constant, subnormal, huge and lopsided blocks among them."""
    w = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    info = torch.finfo(dtype)
    w[64:128], w[128:192], w[192:256] = 0, 0.3, -info.max
    w[256:320] = torch.linspace(-1, 1, 64).to(dtype) * info.tiny  # subnormal
    w[320:384] = torch.linspace(-1, 1, 64).to(dtype) * info.max
    w[384:448] = 0
    w[400] = -info.smallest_normal
    w[448:512] = -0.0
    # The reciprocal of a huge scale is subnormal and so inexact that scaled values exceed 1.
    w[4096:8192] = (w[4096:8192].float().clamp(-4, 4) / 4 * info.max).to(dtype)
    w[-40:] = 0
    return w


@cache
def by_the_reference(dtype: torch.dtype, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_4bit(blocks_of_every_kind(dtype), codebook(quant_type), block_size)


def quantized(w: torch.Tensor, values: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return codes, native_codec.quantize_4bit(w, *thresholds(values), block_size, codes)


def dequantized(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int, out: Tensor) -> Tensor:
    native_codec.dequantize_4bit(codes, absmax, None, None, values, block_size, out)
    return out


def test_the_best_instruction_set_is_the_default() -> None:
    assert native.isas()[0] == "scalar"
    assert native.isa() == native.isas()[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_bytes_of_the_reference(isa: str, threads: int, quant_type: str, dtype: torch.dtype) -> None:
    w, values = blocks_of_every_kind(dtype), codebook(quant_type)
    for block_size in (32, 64, 4096):
        codes, absmax = quantized(w, values, block_size)
        expected = by_the_reference(dtype, quant_type, block_size)
        assert torch.equal(codes, expected[0])
        assert torch.equal(absmax.view(torch.int32), expected[1].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restored_values_are_the_product_rounded_once(isa: str, threads: int, dtype: torch.dtype) -> None:
    # Scales down to subnormals and up to where the product overflows 16 bits.
    absmax = torch.rand(-(-SIZE // 64)) * 10.0 ** torch.randint(-44, 38, (-(-SIZE // 64),))
    codes = torch.randint(256, ((SIZE + 1) // 2,), dtype=torch.uint8)
    index = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[:SIZE].long()
    for values in (codebook("nf4"), torch.linspace(1, -1, 16)):
        exact = values[index] * absmax.repeat_interleave(64)[:SIZE]
        got = dequantized(codes, absmax, values, 64, torch.empty(SIZE, dtype=dtype))
        assert torch.equal(got.view(torch.int8), exact.to(dtype).view(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restored_into_memory_that_starts_anywhere(isa: str, dtype: torch.dtype) -> None:
    # 20 MB and more are written past the cache where the memory is aligned: the first of each pair is.
    for numel in (1000, 10_000_000):
        codes = torch.randint(256, (numel // 2,), dtype=torch.uint8)
        absmax = torch.rand(-(-numel // 64))
        memory = torch.full((numel + 64,), 7, dtype=dtype)
        assert memory.data_ptr() % 64 == 0
        aligned = dequantized(codes, absmax, codebook("nf4"), 64, memory[:numel]).clone()
        moved = dequantized(codes, absmax, codebook("nf4"), 64, memory[3 : numel + 3])
        assert torch.equal(aligned, moved)
        assert torch.equal(memory[numel + 3 :], torch.full((61,), 7, dtype=dtype))


def test_inputs_that_start_anywhere(isa: str) -> None:
    for dtype in DTYPES:
        w = torch.randn(1001).to(dtype)
        expected = reference.quantize_4bit(w[1:], codebook("nf4"), 64)
        got = quantized(w[1:], codebook("nf4"), 64)
        assert all(map(torch.equal, got, expected))


def test_scales_restored_on_the_fly(isa: str, threads: int) -> None:
    codes, absmax = reference.quantize_4bit(torch.randn(SIZE), codebook("nf4"), 32)
    codes8, nested, offset = reference.quantize_absmax(absmax)
    restored = reference.dequantize_absmax(codes8, nested, offset)
    assert torch.equal(native_codec.dequantize_absmax(codes8, nested, offset), restored)
    plain = dequantized(codes, restored, codebook("nf4"), 32, torch.empty(SIZE))
    out = torch.empty(SIZE)
    native_codec.dequantize_4bit(codes, codes8, nested, offset, codebook("nf4"), 32, out)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 4096, 4097, 3 * 4096 + 5, 100_000])
def test_double_quantization_for_any_number_of_threads(threads: int, size: int) -> None:
    absmax = torch.rand(size) * 3
    assert all(map(torch.equal, native_codec.quantize_absmax(absmax), reference.quantize_absmax(absmax)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_first_value_that_is_not_finite(isa: str, threads: int, dtype: torch.dtype, bad: float) -> None:
    w = torch.full((SIZE,), torch.finfo(dtype).max, dtype=dtype)
    assert native_codec.find_nonfinite(w) == -1
    for position in (SIZE - 1, 2 * 65_536 + 1, 65_535, 33, 0):
        w[position] = bad
        assert native_codec.find_nonfinite(w) == position
        _, absmax = quantized(w, codebook("nf4"), 64)
        assert not absmax[position // 64].isfinite()
        assert absmax[: position // 64].isfinite().all()
