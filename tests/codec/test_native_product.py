"""The many-row product in C++ and its gradient: exactness, and independence of threads, rows and layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fourbit import reference
from fourbit.codebooks import codebook
from fourbit.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native library: {native.load_error()}")

DTYPES = (torch.float32, torch.bfloat16)
# (rows of x, K, N, block size): whole tiles and panels and not, whole blocks and not, odd sizes, several
# panels in depth, blocks longer than a row.
SHAPES = [
    (24, 576, 192, 64),
    (17, 96, 35, 32),
    (1, 64, 1, 64),
    (13, 101, 33, 64),
    (40, 1, 31, 64),
    (37, 33, 1, 64),
    (12, 2112, 65, 64),
    (25, 1027, 40, 128),
    (30, 4096, 9, 4096),
    (8, 70, 2090, 64),
    (1100, 64, 40, 32),
]


def cases() -> list[tuple[str, torch.dtype]]:
    """Instruction sets with the dtypes they multiply; the others are torch's."""
    found, before = [], native.isa()
    for isa in native.isas():
        native.set_isa(isa)
        found += [(isa, dtype) for dtype in DTYPES if native.has_product(dtype)]
    native.set_isa(before)
    return found


@pytest.fixture(params=cases() if native.available() else (), ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A dtype, while native code runs an instruction set that multiplies it."""
    before = native.isa()
    native.set_isa(request.param[0])
    yield request.param[1]
    native.set_isa(before)


def packed(out_features: int, in_features: int, block_size: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_4bit(torch.randn(out_features, in_features), codebook("nf4"), block_size)


def forward(x: Tensor, weight: tuple[Tensor, Tensor], block_size: int, n: int, bias: Tensor | None) -> Tensor:
    return native.product_4bit(x, *weight, None, None, codebook("nf4"), block_size, n, bias)


def backward(grad: Tensor, weight: tuple[Tensor, Tensor], block_size: int, k: int) -> Tensor:
    return native.product_4bit(grad, *weight, None, None, codebook("nf4"), block_size, k, gradient=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows, k, n, block_size = shape
    weight = packed(n, k, block_size)
    full = reference.dequantize_4bit(*weight, (n, k), codebook("nf4"), block_size, dtype)
    bias = torch.randn(n).to(dtype)
    for draw in (torch.randn, torch.rand):  # and of one sign, where errors add up
        x, grad = draw(rows, k).to(dtype), draw(rows, n).to(dtype)
        results = (
            (forward(x, weight, block_size, n, bias), x, full.T, bias.double()),
            (forward(x, weight, block_size, n, None), x, full.T, torch.zeros(())),
            (backward(grad, weight, block_size, k), grad, full, torch.zeros(())),
        )
        for got, left, right, added in results:
            truth = left.double() @ right.double() + added
            # One rounding of the result, and fp32 sums that drift by the square root of their length.
            magnitude = left.double().abs() @ right.double().abs() + added.abs()
            depth = left.shape[1]
            bound = torch.finfo(dtype).eps / 2 * truth.abs() + 2e-7 * depth**0.5 * magnitude + 1e-38
            assert bool(((got.double() - truth).abs() <= bound).all())


@pytest.mark.parametrize(("k", "block_size"), [(576, 64), (101, 64)])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, k: int, block_size: int) -> None:
    weight, x, grad = packed(37, k, block_size), torch.randn(30, k).to(dtype), torch.randn(30, 37).to(dtype)
    x[3, 5], grad[4, 6] = torch.inf, torch.nan
    whole, whole_grad = forward(x, weight, block_size, 37, None), backward(grad, weight, block_size, k)
    for rows in (slice(1), slice(3, 4), slice(4, 29), slice(13, 26)):
        part = forward(x[rows], weight, block_size, 37, None)
        assert torch.equal(part.nan_to_num(7), whole[rows].nan_to_num(7))
        part = backward(grad[rows], weight, block_size, k)
        assert torch.equal(part.nan_to_num(7), whole_grad[rows].nan_to_num(7))
    assert not bool(whole[3].isfinite().any())
    assert bool(whole_grad[4].isnan().all())
    assert bool(whole[:3].isfinite().all())
    assert bool(whole[4:].isfinite().all())


def test_threads_do_not_show(dtype: torch.dtype, threads: int) -> None:
    weight, x, grad = packed(1000, 576, 64), torch.randn(70, 576).to(dtype), torch.randn(70, 1000).to(dtype)
    got, got_grad = forward(x, weight, 64, 1000, None), backward(grad, weight, 64, 576)
    torch.set_num_threads(1)
    assert torch.equal(got, forward(x, weight, 64, 1000, None))
    assert torch.equal(got_grad, backward(grad, weight, 64, 576))


@pytest.mark.parametrize(("k", "block_size"), [(576, 64), (101, 64), (2048, 32)])
def test_double_quantized_scales(dtype: torch.dtype, k: int, block_size: int) -> None:
    codes, absmax = packed(130, k, block_size)
    parts = reference.quantize_absmax(absmax)
    restored = (codes, reference.dequantize_absmax(*parts))
    x, grad = torch.randn(20, k).to(dtype), torch.randn(20, 130).to(dtype)
    book = codebook("nf4")
    got = native.product_4bit(x, codes, *parts, book, block_size, 130)
    assert torch.equal(got, forward(x, restored, block_size, 130, None))
    got = native.product_4bit(grad, codes, *parts, book, block_size, k, gradient=True)
    assert torch.equal(got, backward(grad, restored, block_size, k))


def test_every_weight_meets_its_own_value(dtype: torch.dtype) -> None:
    # The product with the unit matrix is the weight itself, element by element.
    for n, k in ((40, 96), (33, 101), (70, 1030)):
        weight = packed(n, k, 64)
        full = reference.dequantize_4bit(*weight, (n, k), codebook("nf4"), 64, dtype)
        assert torch.equal(forward(torch.eye(k).to(dtype), weight, 64, n, None), full.T)
        assert torch.equal(backward(torch.eye(n).to(dtype), weight, 64, k), full)


def test_like_torch_on_a_model_s_matrices(dtype: torch.dtype) -> None:
    for n, k in ((576, 1536), (192, 576)):
        weight, x = packed(n, k, 64), torch.randn(160, k).to(dtype)
        full = reference.dequantize_4bit(*weight, (n, k), codebook("nf4"), 64, dtype)
        truth = x.double() @ full.double().T
        torchs = (F.linear(x, full).double() - truth).norm()
        assert (forward(x, weight, 64, n, None).double() - truth).norm() <= 1.05 * torchs
