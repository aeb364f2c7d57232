"""Codes and first-level scales are bitsandbytes 0.50.2's bytes, on every implementation.

The oracle is bitsandbytes' CPU code (backends/default/ops.py). Where it is wrong, the test says so and
what the exact answer is.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from fourbit import codebooks
from fourbit import functional as F4

bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def assert_same_bytes(w: Tensor, quant_type: str, block_size: int) -> None:
    codes, state = bnb.quantize_4bit(w, quant_type=quant_type, blocksize=block_size)
    q = F4.quantize_4bit(w, quant_type, block_size)
    assert torch.equal(q.absmax.view(torch.int32), state.absmax.view(torch.int32))
    assert torch.equal(q.codes, codes.view(-1))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", codebooks.BLOCK_SIZES)
def test_random_and_odd_sizes(
    implementation: str, quant_type: str, dtype: torch.dtype, block_size: int
) -> None:
    for numel in (1, 2, 31, 33, 4096, 8191, 3 * 4096 + 65, 40_003):
        assert_same_bytes(torch.randn(numel).to(dtype), quant_type, block_size)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_zero_and_extreme(implementation: str, quant_type: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    w = torch.zeros(9, 64, dtype=dtype)  # row 0 stays zero
    w[1], w[2], w[3] = 0.3, -0.3, info.tiny
    w[4] = torch.linspace(-1, 1, 64).to(dtype) * info.max
    w[5] = torch.linspace(-1, 1, 64).to(dtype) * info.tiny  # subnormal
    w[6, 5], w[7, 63], w[8, 0] = 1.0, -1e-5, info.smallest_normal
    assert_same_bytes(w, quant_type, 64)
    assert_same_bytes(w, quant_type, 32)


@BOTH
@pytest.mark.parametrize("tail", [0, 33], ids=["full", "short tail"])
def test_ties_go_to_the_lower_value(implementation: str, quant_type: str, tail: int) -> None:
    # With absmax a power of two the scaled value is exactly the threshold.
    bounds, order = codebooks.thresholds(codebooks.codebook(quant_type))
    below = bounds.nextafter(torch.tensor(-2.0))
    above = bounds.nextafter(torch.tensor(2.0))
    block = torch.cat([bounds, below, above, torch.tensor([1.0])])  # 46 values
    w = torch.cat([torch.nn.functional.pad(block, (0, 18)) * 2.0**e for e in (0, -1, 5, 60, -60)])
    if tail:
        w = torch.cat([w, bounds, below, torch.tensor([1.0, 0.0, -1.0])])
    assert_same_bytes(w, quant_type, 64)
    q = F4.quantize_4bit(w, quant_type, 64)
    first = torch.stack([q.codes >> 4, q.codes & 15], dim=1).view(-1)[:46]
    assert torch.equal(first[:15], order[:15])
    assert torch.equal(first[15:30], order[:15])
    assert torch.equal(first[30:45], order[1:])


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_around_every_threshold(implementation: str, quant_type: str, dtype: torch.dtype) -> None:
    # Any absmax: fp32 rounding of the reciprocal and of the product decides, so it has to be the same.
    bounds, _ = codebooks.thresholds(codebooks.codebook(quant_type))
    absmax = torch.rand(400, 1) * 10
    near = bounds * absmax
    w = torch.cat(
        [absmax, near, near.nextafter(absmax), near.nextafter(-absmax), torch.zeros(400, 18)], dim=1
    )
    assert w.shape == (400, 64)
    assert_same_bytes(w.to(dtype), quant_type, 64)
    # A short block divides by absmax instead of multiplying by its reciprocal, and rounds otherwise.
    for row in w[:100, :46]:
        assert_same_bytes(row.to(dtype), quant_type, 64)


@BOTH
def test_zero_tail(implementation: str, quant_type: str) -> None:
    # bitsandbytes stores its division guard, 1e-38, as the scale of a short last block of zeros. The
    # largest magnitude of zeros is 0. Codes are the same.
    w = torch.cat([torch.randn(64), torch.zeros(7)])
    codes, state = bnb.quantize_4bit(w, quant_type=quant_type)
    q = F4.quantize_4bit(w, quant_type)
    assert torch.equal(q.codes, codes.view(-1))
    assert state.absmax[1] > 0
    assert q.absmax[1] == 0
    assert q.absmax[0] == state.absmax[0]


def test_odd_end_is_filled_with_zero(implementation: str) -> None:
    assert F4.quantize_4bit(torch.ones(1), "nf4").codes.item() == 0xF7
    assert F4.quantize_4bit(torch.ones(1), "fp4").codes.item() == 0x30


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_restored_weights(
    implementation: str, quant_type: str, dtype: torch.dtype, double_quant: bool
) -> None:
    # bitsandbytes restores rightly where rows are whole blocks.
    w = torch.randn(48, 256).to(dtype)
    codes, state = bnb.quantize_4bit(w, quant_type=quant_type)
    if double_quant:  # from equal codes: the scales as fourbit quantized them, read by bitsandbytes
        q = F4.quantize_4bit(w, quant_type, double_quant=True)
        second = bnb.QuantState(
            absmax=q.nested_absmax, blocksize=256, code=bnb.create_dynamic_map(), dtype=torch.float32
        )
        state = bnb.QuantState(
            absmax=q.absmax, shape=w.shape, dtype=dtype, blocksize=64, code=state.code,
            quant_type=quant_type, offset=q.offset, state2=second,
        )  # fmt: skip
    else:
        q = F4.quantize_4bit(w, quant_type)
    expected = bnb.dequantize_4bit(codes, state)
    assert torch.equal(F4.dequantize_4bit(q), expected)


@BOTH
@pytest.mark.parametrize("columns", [96, 100, 4304])
def test_columns_that_are_not_whole_blocks(implementation: str, quant_type: str, columns: int) -> None:
    # bitsandbytes' AVX-512 kernel takes the scale of row * (columns // 64), which is another block's
    # from the second row on. The layout says: block i // 64 of the flat tensor.
    w = torch.randn(7, columns)
    q = F4.quantize_4bit(w, quant_type)
    restored = F4.dequantize_4bit(q)
    nibbles = torch.stack([q.codes >> 4, q.codes & 15], dim=1).view(-1)[: w.numel()].long()
    scales = q.absmax[torch.arange(w.numel()) // 64]
    assert torch.equal(restored.view(-1), q.codebook[nibbles] * scales)


@pytest.fixture(scope="module")
def real_weights(smollm2: Path) -> list[tuple[Tensor, str, Tensor, Tensor]]:
    """Seven matrices of SmolLM2-135M, with bitsandbytes' codes and scales."""
    matrices = [
        t for t in gguf.GGUFReader(smollm2).tensors if t.name.startswith("blk.17.") and len(t.shape) == 2
    ]
    assert len(matrices) == 7
    cases = []
    for number, matrix in enumerate(matrices):
        w = torch.from_numpy(gguf.dequantize(matrix.data, matrix.tensor_type)).to(DTYPES[number % 3])
        for quant_type in ("nf4", "fp4"):
            codes, state = bnb.quantize_4bit(w, quant_type=quant_type)
            cases.append((w, quant_type, codes.view(-1), state.absmax))
    return cases


def test_real_weights(implementation: str, real_weights: list[tuple[Tensor, str, Tensor, Tensor]]) -> None:
    for w, quant_type, codes, absmax in real_weights:
        q = F4.quantize_4bit(w, quant_type)
        assert torch.equal(q.codes, codes)
        assert torch.equal(q.absmax, absmax)
