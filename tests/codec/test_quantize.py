"""Quantizing and restoring: errors, shapes, data types, codebooks, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fourbit import codebooks, reference
from fourbit import functional as F4
from fourbit.errors import QuantizationError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Exponent of three bits, no mantissa: the paper's third 4-bit float (section 5, table 2).
_E3M0 = torch.tensor([0, 0.25, 0.5, 1, 2, 4, 8, 16]) / 16
E3M0 = torch.cat([_E3M0, -_E3M0])

# Mean error of randn(1024, 1024) and its standard deviation over 200 draws, in 1e-6, as bitsandbytes
# publishes them in its tests: block size, then absolute and relative error.
PUBLISHED = {
    "nf4": (
        (32, 67746, 69, 189726, 304),
        (64, 72798, 74, 203339, 340),
        (128, 76831, 91, 215237, 391),
        (256, 80337, 102, 226105, 398),
        (512, 83547, 143, 236079, 544),
        (1024, 86610, 187, 245370, 600),
        (2048, 89592, 251, 254163, 747),
        (4096, 92547, 360, 262473, 999),
    ),
    "fp4": (
        (32, 88925, 91, 242443, 330),
        (64, 96543, 111, 260125, 379),
        (128, 102969, 134, 275817, 433),
        (256, 108684, 182, 289831, 497),
        (512, 114115, 234, 302881, 583),
        (1024, 119333, 320, 315000, 757),
        (2048, 124556, 455, 326607, 955),
        (4096, 129536, 612, 337169, 1239),
    ),
}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_error_is_the_published_one(implementation: str, quant_type: str) -> None:
    w = torch.randn(1024, 1024)
    for block_size, absolute, absolute_sigma, relative, relative_sigma in PUBLISHED[quant_type]:
        error = (F4.dequantize_4bit(F4.quantize_4bit(w, quant_type, block_size)) - w).abs()
        assert abs(error.mean() * 1e6 - absolute) < 7 * absolute_sigma, block_size
        assert abs((error / (w.abs() + 1e-8)).mean() * 1e6 - relative) < 7 * relative_sigma, block_size


def test_squared_error_of_the_four_types(implementation: str) -> None:
    w = torch.randn(20_000, 64)

    def error(**how: object) -> float:
        return (F4.dequantize_4bit(F4.quantize_4bit(w, **how)) - w).square().mean().item()

    assert error(quant_type="nf4") == pytest.approx(0.00846, rel=0.01)
    assert error(quant_type="int4") == pytest.approx(0.01161, rel=0.01)
    assert error(quant_type="fp4") == pytest.approx(0.01489, rel=0.01)
    assert error(codebook=E3M0) == pytest.approx(0.03542, rel=0.01)


def nearest_codes(w: Tensor, codebook: Tensor, block_size: int) -> np.ndarray:
    """Codes by NumPy, from the definition; w consists of whole blocks."""
    blocks = w.float().numpy().reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    y = np.clip(blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38))), -1, 1)
    order = np.argsort(codebook.numpy(), kind="stable")
    values = codebook.numpy()[order]
    return order[np.searchsorted((values[:-1] + values[1:]) / np.float32(2), y.reshape(-1), side="left")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_codebook(implementation: str, dtype: torch.dtype) -> None:
    shuffled = torch.rand(16) * 2 - 1
    shuffled[7] = -1  # -1 without 1
    dense = torch.linspace(-1, 1, 16).nextafter(torch.tensor(0.0)).clone()
    dense[0] = -1
    one_sided = torch.rand(16).sort(descending=True).values
    one_sided /= one_sided.max()
    for codebook in (E3M0, shuffled, dense, one_sided, codebooks.codebook("int4"), torch.ones(16)):
        w = torch.randn(30, 256).to(dtype)
        w[0], w[1, ::2] = 0, 1
        q = F4.quantize_4bit(w, block_size=128, codebook=codebook)
        assert q.quant_type == "custom"
        codes = torch.stack([q.codes >> 4, q.codes & 15], dim=1).view(-1)
        assert np.array_equal(codes.numpy(), nearest_codes(w, codebook, 128))
        restored = F4.dequantize_4bit(q, torch.float32)
        assert torch.equal(restored.view(-1), codebook[codes.int()] * q.absmax.repeat_interleave(128))


def test_int4_never_uses_its_spare_code(implementation: str) -> None:
    # Scaled values may round to just above 1, where a comparison with the last threshold would find 15.
    q = F4.quantize_4bit(torch.randn(4000, 32) * torch.rand(4000, 1), "int4", 32)
    assert (q.codes & 15).max() <= 14
    assert (q.codes >> 4).max() <= 14


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", codebooks.QUANT_TYPES)
@pytest.mark.parametrize(
    "shape", [(), (1,), (65,), (3, 5, 7), (2, 3, 64), (257, 129), (0,), (0, 7), (5, 0, 3)], ids=str
)
def test_shapes_against_the_reference(
    implementation: str, shape: tuple[int, ...], quant_type: str, double_quant: bool
) -> None:
    for dtype in DTYPES:
        w = torch.randn(shape).to(dtype)
        q = F4.quantize_4bit(w, quant_type, 32, double_quant)
        codes, absmax = reference.quantize_4bit(w, codebooks.codebook(quant_type), 32)
        assert torch.equal(q.codes, codes)
        if double_quant:
            absmax = reference.dequantize_absmax(*reference.quantize_absmax(absmax))
        assert torch.equal(F4.absmax_of(q), absmax)
        for wanted in DTYPES:
            expected = reference.dequantize_4bit(codes, absmax, shape, q.codebook, 32, wanted)
            restored = F4.dequantize_4bit(q, wanted)
            assert restored.shape == shape
            assert torch.equal(restored, expected)
        assert F4.dequantize_4bit(q).dtype == dtype


def test_a_large_result_is_written_whole(implementation: str) -> None:
    # Past the size from which huge pages are asked for, and not a multiple of one.
    w = torch.randn(3001, 3003)
    q = F4.quantize_4bit(w)
    expected = reference.dequantize_4bit(q.codes, q.absmax, q.shape, q.codebook, 64, torch.float32)
    assert torch.equal(F4.dequantize_4bit(q), expected)


def test_reference_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(100_001).half()
    codebook = codebooks.codebook("nf4")
    codes, absmax = reference.quantize_4bit(w, codebook, 4096)
    restored = reference.dequantize_4bit(codes, absmax, w.shape, codebook, 4096, w.dtype)
    monkeypatch.setattr(reference, "_PIECE", 8192)
    for got, expected in zip(reference.quantize_4bit(w, codebook, 4096), (codes, absmax), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(reference.dequantize_4bit(codes, absmax, w.shape, codebook, 4096, w.dtype), restored)
    assert reference.find_nonfinite(w) == -1
    w[70_000:] = torch.nan
    assert reference.find_nonfinite(w) == 70_000


def test_input_that_is_not_contiguous_or_wants_a_gradient(implementation: str) -> None:
    w = torch.randn(64, 96, requires_grad=True)
    expected = F4.quantize_4bit(w.detach().T.contiguous())
    q = F4.quantize_4bit(w.T)
    assert torch.equal(q.codes, expected.codes)
    assert torch.equal(q.absmax, expected.absmax)
    with torch.inference_mode():
        assert torch.equal(F4.quantize_4bit(w.T).codes, expected.codes)


def test_same_bytes_for_any_number_of_threads(implementation: str) -> None:
    w = torch.randn(1_000_003)
    threads, expected = torch.get_num_threads(), F4.quantize_4bit(w, double_quant=True)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            q = F4.quantize_4bit(w, double_quant=True)
            assert torch.equal(q.codes, expected.codes)
            assert torch.equal(q.absmax, expected.absmax)
            assert torch.equal(q.nested_absmax, expected.nested_absmax)
            assert torch.equal(q.offset, expected.offset)
            assert torch.equal(F4.dequantize_4bit(q), F4.dequantize_4bit(expected))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("value", "word"), [(torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf")])
def test_not_finite_is_refused_with_name_and_position(
    implementation: str, dtype: torch.dtype, value: float, word: str
) -> None:
    for row, column in ((0, 0), (3, 17), (70, 100), (99, 100)):  # the last is in the short block
        w = torch.randn(100, 101).to(dtype)
        w[row, column] = value
        w[99, 100] = torch.nan if (row, column) != (99, 100) else value
        with pytest.raises(QuantizationError) as raised:
            F4.quantize_4bit(w, name="model.layers.3.mlp.up_proj.weight")
        assert str(raised.value) == (
            f"model.layers.3.mlp.up_proj.weight of shape [100, 101] has {word} at [{row}, {column}]; "
            "a weight that is not finite cannot be quantized, repair the checkpoint"
        )


def test_not_finite_scalar_without_a_name(implementation: str) -> None:
    with pytest.raises(QuantizationError, match=r"the tensor of shape \[\] has inf at \[\];"):
        F4.quantize_4bit(torch.tensor(torch.inf))


REFUSED = (
    ({"w": torch.zeros(64, dtype=torch.float64)}, "the tensor to quantize is torch.float64; convert it to"),
    (
        {"w": torch.zeros(64, dtype=torch.int32)},
        "the tensor to quantize is torch.int32; convert it to float32",
    ),
    ({"block_size": 65}, "block_size 65 is not possible; use one of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
    ({"quant_type": "fp44"}, "quant_type 'fp44' is unknown (did you mean 'fp4'?); use one of nf4, fp4, int4"),
    ({"quant_type": "custom"}, "quant_type 'custom' needs a codebook; pass codebook=fp32 [16]"),
    (
        {"codebook": torch.zeros(16)},
        "the largest magnitude of a codebook must be 1, this one's is 0.0; divide",
    ),
)


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_errors_say_what_and_what_to_do(arguments: dict, message: str) -> None:
    with pytest.raises(QuantizationError) as raised:
        F4.quantize_4bit(**{"w": torch.zeros(64), **arguments})
    assert str(raised.value).startswith(message)


def test_parts_that_do_not_fit_are_refused(implementation: str) -> None:
    # Native code reads as many bytes as the shape promises, so this must never reach it.
    q = F4.quantize_4bit(torch.randn(64, 64), double_quant=True)
    parts = {"codes": q.codes, "absmax": q.absmax, "nested": q.nested_absmax, "offset": q.offset}
    wrong = [
        {"codes": q.codes[:-1]},
        {"codes": q.codes.view(torch.int8)},
        {"absmax": q.absmax[:-1]},
        {"absmax": F4.absmax_of(q)},
        {"nested": q.nested_absmax.repeat(2)},
        {"nested": q.nested_absmax.double()},
        {"nested": None},
        {"offset": None},
        {"offset": q.offset.double()},
    ]
    for change in wrong:
        with pytest.raises(QuantizationError):
            torch.ops.fourbit.dequantize_4bit(
                *{**parts, **change}.values(), q.codebook, 64, [64, 64], torch.float32
            )
    with pytest.raises(QuantizationError, match=r"the wanted dtype is torch\.float64"):
        F4.dequantize_4bit(q, torch.float64)
    with pytest.raises(QuantizationError, match=r"codes has 2048 values of torch\.uint8 where"):
        torch.ops.fourbit.dequantize_4bit(*parts.values(), q.codebook, 64, [65, 64], torch.float32)
