"""The few-row product in C++: exactness, and independence of threads, of M and of the layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fourbit import reference
from fourbit.codebooks import codebook
from fourbit.kernels import codec as native_codec
from fourbit.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native library: {native.load_error()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows of x, K, N, block size): whole blocks and not, odd K, tiles and chunks that do not fill.
SHAPES = [
    (1, 576, 192, 64),
    (1, 64, 1, 64),
    (2, 96, 35, 32),
    (3, 160, 33, 32),
    (4, 320, 18, 64),
    (5, 384, 21, 128),
    (7, 4096, 9, 4096),
    (16, 192, 17, 64),
    (19, 64, 3, 64),
    (2, 96, 70, 64),
    (1, 101, 7, 64),
    (3, 4304, 5, 64),
    (1, 33, 5, 4096),
]


def packed(out_features: int, in_features: int, block_size: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_4bit(torch.randn(out_features, in_features), codebook("nf4"), block_size)


def multiply(
    x: Tensor, weight: tuple[Tensor, Tensor], block_size: int, out_features: int, bias: Tensor | None
) -> Tensor:
    return native_codec.linear_4bit(x, *weight, None, None, codebook("nf4"), block_size, out_features, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows, in_features, out_features, block_size = shape
    weight = packed(out_features, in_features, block_size)
    full = reference.dequantize_4bit(
        *weight, (out_features, in_features), codebook("nf4"), block_size, torch.float32
    )
    # Inputs of one sign: an error that a codebook value carried everywhere would add up.
    for x in (torch.randn(rows, in_features), torch.rand(rows, in_features)):
        x, bias = x.to(dtype), torch.randn(out_features).to(dtype)
        truth = x.double() @ full.double().T + bias.double()
        error = (multiply(x, weight, block_size, out_features, bias).double() - truth).abs().max()
        torchs = (F.linear(x, full.to(dtype), bias).double() - truth).abs().max()
        # Where torch happens to be exact: an ulp of the sum's largest term in fp32.
        assert error <= 1.5 * torchs + 2e-6 * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "block_size"), [(576, 64), (96, 32), (256, 128), (101, 64)])
def test_a_row_does_not_depend_on_the_others(
    isa: str,
    dtype: torch.dtype,
    in_features: int,
    block_size: int,
) -> None:
    weight, x = packed(37, in_features, block_size), torch.randn(50, in_features).to(dtype)
    # One row alone is not multiplied in tiles.
    least = 2 if isa == "amx" and dtype == torch.bfloat16 else 1
    each = torch.cat([multiply(row.repeat(least, 1), weight, block_size, 37, None)[:1] for row in x.split(1)])
    for rows in (*range(least, 22), 32, 33, 50):
        assert torch.equal(multiply(x[:rows], weight, block_size, 37, None), each[:rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_show(isa: str, threads: int, dtype: torch.dtype) -> None:
    weight, x = packed(1000, 576, 64), torch.randn(3, 576).to(dtype)
    got = multiply(x, weight, 64, 1000, None)
    torch.set_num_threads(1)
    assert torch.equal(got, multiply(x, weight, 64, 1000, None))


@pytest.mark.parametrize(("in_features", "block_size"), [(576, 64), (101, 64), (2048, 32)])
def test_double_quantized_scales(isa: str, in_features: int, block_size: int) -> None:
    codes, absmax = packed(130, in_features, block_size)
    codes8, nested, offset = reference.quantize_absmax(absmax)
    restored = reference.dequantize_absmax(codes8, nested, offset)
    for dtype in DTYPES:
        x = torch.randn(2, in_features).to(dtype)
        got = native_codec.linear_4bit(
            x, codes, codes8, nested, offset, codebook("nf4"), block_size, 130, None
        )
        assert torch.equal(got, multiply(x, (codes, restored), block_size, 130, None))


def test_memory_that_starts_and_ends_anywhere(isa: str) -> None:
    codes, absmax = packed(20, 320, 64)
    # A scale read past the end would spoil the last row, even where it meets padding.
    poison = torch.tensor([torch.nan])
    moved = (torch.cat([codes[:1], codes])[1:], torch.cat([poison, absmax, poison, poison, poison])[1:101])
    for dtype in DTYPES:
        x = torch.randn(5 * 320 + 1).to(dtype)
        got = multiply(x[1:].view(5, 320), moved, 64, 20, None)
        assert torch.equal(got, multiply(x[1:].clone().view(5, 320), (codes, absmax), 64, 20, None))


def test_codes_of_every_value_and_any_codebook(isa: str) -> None:
    # One weight differs from zero at a time: y is that weight, whichever nibble and lane holds it.
    values = torch.linspace(-1, 1, 16)[torch.randperm(16)]
    zero = torch.zeros(16)
    for code in range(16):
        only = zero.clone()
        only[code] = values[code]
        codes = torch.randint(256, (3 * 128,), dtype=torch.uint8)
        index = torch.stack([codes >> 4, codes & 15], dim=1).view(3, 256)
        absmax = torch.tensor([0.5, 1, 2, 4, 8, 16, 32, 64, 0.25, 3, 5, 7])
        got = native_codec.linear_4bit(torch.eye(256), codes, absmax, None, None, only, 64, 3, None)
        expected = only[index.long()] * absmax.repeat_interleave(64).view(3, 256)
        assert torch.equal(got, expected.T)
