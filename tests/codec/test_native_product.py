"""The many-row product in C++ and its gradient: exactness, and independence of threads, rows and layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fourbit import reference
from fourbit.codebooks import codebook
from fourbit.kernels import codec as native_codec
from fourbit.kernels import native
from fourbit.kernels.product import Adapter, Dropout, Packed, has_product, product, product_grad

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native library: {native.load_error()}")

DTYPES = (torch.float32, torch.bfloat16)
# (rows of x, K, N, block size): whole tiles and panels and not, whole blocks and not, odd sizes, several
# panels in depth, blocks longer than a row; so deep that with AMX several panels meet the rows together.
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
    (150, 2310, 290, 64),
    (131, 320, 2200, 64),
]


def cases() -> list[tuple[str, torch.dtype]]:
    """Instruction sets with the dtypes they multiply; the others are torch's."""
    found, before = [], native.isa()
    for isa in native.isas():
        native.set_isa(isa)
        found += [(isa, dtype) for dtype in DTYPES if has_product(dtype)]
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
    y, _ = product(x, Packed(n, x.shape[1], *weight, None, None, codebook("nf4"), block_size), bias)
    return y


def backward(grad: Tensor, weight: tuple[Tensor, Tensor], block_size: int, k: int) -> Tensor:
    packed_weight = Packed(grad.shape[1], k, *weight, None, None, codebook("nf4"), block_size)
    return product_grad(grad, packed_weight)[0]


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
    for n, k, rows in ((1000, 576, 70), (2200, 320, 150), (290, 2304, 550)):
        weight, x, grad = packed(n, k, 64), torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
        torch.set_num_threads(threads)
        got, got_grad = forward(x, weight, 64, n, None), backward(grad, weight, 64, k)
        torch.set_num_threads(1)
        assert torch.equal(got, forward(x, weight, 64, n, None))
        assert torch.equal(got_grad, backward(grad, weight, 64, k))


@pytest.mark.parametrize(("k", "block_size"), [(576, 64), (101, 64), (2048, 32)])
def test_double_quantized_scales(dtype: torch.dtype, k: int, block_size: int) -> None:
    codes, absmax = packed(130, k, block_size)
    parts = reference.quantize_absmax(absmax)
    restored = (codes, reference.dequantize_absmax(*parts))
    x, grad = torch.randn(20, k).to(dtype), torch.randn(20, 130).to(dtype)
    weight = Packed(130, k, codes, *parts, codebook("nf4"), block_size)
    assert torch.equal(product(x, weight)[0], forward(x, restored, block_size, 130, None))
    assert torch.equal(product_grad(grad, weight)[0], backward(grad, restored, block_size, k))


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


def adapter(n: int, k: int, rank: int, rows: int = 0, p: float = 0.0) -> Adapter:
    dropout = None
    if p:
        dropout = Dropout(torch.arange(rows) // 7, torch.arange(rows) % 7, 3, 12345678901, 2, p)
    return Adapter(torch.randn(rank, k) / k**0.5, torch.randn(n, rank), 1.7, dropout)


# (rows, K, N, rank): tiles, panels, ranks that do not fill and that overflow, odd sizes, long sums over rows.
ADAPTED = [
    (24, 576, 192, 16),
    (1, 64, 33, 1),
    (13, 101, 35, 7),
    (41, 33, 70, 40),
    (530, 64, 48, 8),
    (18, 70, 2090, 64),
    (150, 2304, 290, 16),
    (131, 320, 2200, 9),
]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", ADAPTED, ids=str)
def test_adapter_against_fp64(dtype: torch.dtype, shape: tuple[int, ...], p: float) -> None:
    rows, k, n, rank = shape
    codes = packed(n, k, 64)
    weight, lora = Packed(n, k, *codes, None, None, codebook("nf4"), 64), adapter(n, k, rank, rows, p)
    full = reference.dequantize_4bit(*codes, (n, k), codebook("nf4"), 64, dtype).double()
    x, grad, bias = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype), torch.randn(n).to(dtype)
    y, low = product(x, weight, bias, lora)
    grad_x, grad_a, grad_b = product_grad(grad, weight, lora, x=x, low=low, needs_adapter=True)

    a, b = (part.to(dtype).double().requires_grad_() for part in (lora.a, lora.b))
    true_x = x.double().requires_grad_()
    dropped = true_x
    if p:
        keys = lora.dropout
        ones = torch.ones(rows, k, dtype=torch.float64)
        mask = reference.keyed_dropout(
            ones.float(), p, keys.row, keys.position, keys.layer, keys.seed, keys.step
        )
        dropped = true_x * mask.double()
    true_y = true_x @ full.T + bias.double() + lora.scaling * (dropped @ a.T) @ b.T
    true_y.backward(grad.double())
    # Roundings: of the weight none, of low, of dropped values and of scaling B one each, of the result one.
    bound = 4 * torch.finfo(dtype).eps
    for got, truth in (
        (y, true_y.detach()),
        (low, (dropped @ a.T).detach()),
        (grad_x, true_x.grad),
        (grad_a, a.grad),
        (grad_b, b.grad),
    ):
        assert got.shape == truth.shape
        assert (got.double() - truth).norm() <= bound * truth.norm()


def test_low_is_complete_whichever_thread_comes_first(dtype: torch.dtype) -> None:
    """More threads than cores, so that one takes over what another has not begun."""
    rows, k, n = 96, 192, 640
    weight = Packed(n, k, *packed(n, k, 64), None, None, codebook("nf4"), 64)
    lora, x = adapter(n, k, 16), torch.randn(rows, k).to(dtype)
    grads = [torch.randn(rows, n).to(dtype) for _ in range(2)]
    before = torch.get_num_threads()

    def results(grad: Tensor) -> list[Tensor]:
        low = product(x, weight, None, lora)[1]
        found = [low.clone(), *product_grad(grad, weight, lora, x=x, low=low, needs_adapter=True)]
        low.fill_(7.0)  # memory that the next call may get
        return found

    try:
        torch.set_num_threads(1)
        wanted = [results(grad) for grad in grads]
        torch.set_num_threads(6)
        for turn in range(60):
            assert all(map(torch.equal, results(grads[turn % 2]), wanted[turn % 2]))
    finally:
        torch.set_num_threads(before)


def test_an_adapter_without_effect_changes_nothing(dtype: torch.dtype) -> None:
    weight = Packed(70, 101, *packed(70, 101, 64), None, None, codebook("nf4"), 64)
    x, lora = torch.randn(29, 101).to(dtype), adapter(70, 101, 8)
    still = Adapter(lora.a, torch.zeros_like(lora.b), lora.scaling)
    assert torch.equal(product(x, weight, None, still)[0], product(x, weight)[0])


def test_rows_and_threads_do_not_show_with_an_adapter(dtype: torch.dtype, threads: int) -> None:
    n, k, rows = 96, 320, 600
    weight = Packed(n, k, *packed(n, k, 64), None, None, codebook("nf4"), 64)
    x, grad, lora = (
        torch.randn(rows, k).to(dtype),
        torch.randn(rows, n).to(dtype),
        adapter(n, k, 8, rows, 0.1),
    )

    def everything() -> tuple[Tensor | None, ...]:
        y, low = product(x, weight, None, lora)
        return (y, low, *product_grad(grad, weight, lora, x=x, low=low, needs_adapter=True))

    got = everything()
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(got, everything(), strict=True))
    keys = lora.dropout
    some = Dropout(keys.row[100:140], keys.position[100:140], keys.layer, keys.seed, keys.step, keys.p)
    part, _ = product(x[100:140], weight, None, Adapter(lora.a, lora.b, lora.scaling, some))
    assert torch.equal(part, got[0][100:140])


def test_only_what_is_asked_for(dtype: torch.dtype) -> None:
    weight, lora = Packed(40, 64, *packed(40, 64, 64), None, None, codebook("nf4"), 64), adapter(40, 64, 4)
    x, grad = torch.randn(20, 64).to(dtype), torch.randn(20, 40).to(dtype)
    _, low = product(x, weight, None, lora)
    whole = product_grad(grad, weight, lora, x=x, low=low, needs_adapter=True)
    alone = product_grad(grad, weight, lora)
    assert torch.equal(alone[0], whole[0])
    assert alone[1] is None
    assert alone[2] is None
    none, grad_a, grad_b = product_grad(grad, weight, lora, x=x, low=low, needs_x=False, needs_adapter=True)
    assert none is None
    assert torch.equal(grad_a, whole[1])
    assert torch.equal(grad_b, whole[2])


@pytest.mark.parametrize("rows", [1, 5, 16, 32])
def test_few_rows_are_the_few_row_product_and_the_adapter_on_top(dtype: torch.dtype, rows: int) -> None:
    for n, k, rank in ((96, 320, 16), (35, 101, 3), (40, 64, 33)):
        codes = packed(n, k, 64)
        weight, lora = Packed(n, k, *codes, None, None, codebook("nf4"), 64), adapter(n, k, rank)
        x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
        base = native_codec.linear_4bit(x, *codes, None, None, codebook("nf4"), 64, n, bias)
        y, low = product(x, weight, bias, lora, few=True)
        assert torch.equal(low, product(x, weight, bias, lora)[1])
        truth = base.double() + lora.scaling * low.double() @ lora.b.to(dtype).double().T
        assert (y.double() - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm()
        still = Adapter(lora.a, torch.zeros_like(lora.b), lora.scaling)
        assert torch.equal(product(x, weight, bias, still, few=True)[0], base)
        # Beside itself: one row of bf16 alone is not multiplied in AMX's tiles.
        pairs = [row.repeat(min(rows, 2), 1) for row in x.split(1)]
        each = torch.cat([product(pair, weight, bias, lora, few=True)[0][:1] for pair in pairs])
        assert torch.equal(y, each)
