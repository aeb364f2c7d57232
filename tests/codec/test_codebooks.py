"""The tables: their derivations, and that nothing about the caller's settings gets into them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fourbit import codebooks
from fourbit.errors import QuantizationError


def digest(table: torch.Tensor) -> str:
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()[:16]


def test_nf4_follows_from_normal_quantiles() -> None:
    stats = pytest.importorskip("scipy.stats")

    def half(points: int) -> np.ndarray:  # fp32, from both ends, as torch.linspace computes it
        return stats.norm.ppf(torch.linspace(0.9677083, 0.5, points)[:-1].numpy())

    values = np.sort(np.concatenate([half(9), [0.0], -half(8)]))
    values /= values.max()
    assert np.abs(values - codebooks.codebook("nf4").numpy()).max() < 2e-7  # fp32 differs by platform


def test_tables_are_the_published_bytes() -> None:
    assert digest(codebooks.codebook("nf4")) == "8501941daa1b8a90"
    assert digest(codebooks.dynamic_map()) == "e732639a65f497b4"


def test_int4_is_symmetric_and_complete() -> None:
    values = codebooks.codebook("int4")
    assert torch.equal(values[:15], torch.arange(-7, 8) / 7)
    assert values[15] == 1


def test_tables_do_not_depend_on_the_callers_defaults() -> None:
    makers = (
        lambda: codebooks._codebook.__wrapped__("fp4", "cpu"),
        codebooks.dynamic_map.__wrapped__,
        codebooks.dynamic_thresholds.__wrapped__,
    )
    expected = [make() for make in makers]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            made = [make() for make in makers]
    finally:
        torch.set_default_dtype(torch.float32)
    for table, right in zip(made, expected, strict=True):
        assert torch.equal(table, right)
        assert not table.is_inference()


def test_nearest_of_the_dynamic_map_is_exact() -> None:
    # At and next to every midpoint, where rounding the midpoint itself would show.
    values = codebooks.dynamic_map().double()
    middles = ((values[:-1] + values[1:]) / 2).float()
    y = torch.cat([middles, middles.nextafter(torch.tensor(-2.0)), middles.nextafter(torch.tensor(2.0))])
    index = torch.bucketize(y, codebooks.dynamic_thresholds())
    best = (y.double()[:, None] - values).abs().argmin(dim=1)
    assert torch.equal(index, best)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: codebooks.codebook("nf5"),
            "quant_type 'nf5' is unknown (did you mean 'nf4'?); use one of nf4, fp4, int4",
        ),
        (
            lambda: codebooks.check_codebook(torch.zeros(8)),
            "a codebook has 16 values, this one has shape (8,)",
        ),
        (
            lambda: codebooks.check_codebook(torch.arange(16.0)),
            "the largest magnitude of a codebook must be 1, this one's is 15.0; divide it by that",
        ),
        (
            lambda: codebooks.check_codebook(torch.full((16,), torch.nan)),
            "the largest magnitude of a codebook must be 1, this one's is nan; divide it by that",
        ),
        (
            lambda: codebooks.check_block_size(48),
            "block_size 48 is not possible; use one of 32, 64, 128, 256, 512, 1024, 2048, 4096",
        ),
    ],
)
def test_errors_say_what_and_what_to_do(call, message: str) -> None:
    with pytest.raises(QuantizationError) as raised:
        call()
    assert str(raised.value) == message
