"""Losses and gradients of a chunk of logits: no further from fp64 than torch in fp32."""

from __future__ import annotations

import pytest
import torch

from fourbit.kernels.gpu import loss
from fourbit.ops.loss import _composed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "words"), [(1, 1), (3, 7), (4, 5000), (2, 9001)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.0, 30.0), (0.7, 5.0)])
def test_against_fp64(
    dtype: torch.dtype, rows: int, words: int, scale: float, softcap: float | None, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(words)
    logits = (8 * torch.randn(rows, words, generator=generator)).to(device, dtype)
    labels = torch.randint(0, words, (rows,), generator=generator).to(device)
    truth, slope = _composed(logits.double(), labels, scale, softcap, True)
    single, composed = _composed(logits.float().clone(), labels, scale, softcap, True)
    assert slope is not None
    assert composed is not None
    given = logits.clone()
    without = loss.cross_entropy(given, labels, scale, softcap, False)
    assert torch.equal(given, logits)
    found = loss.cross_entropy(given, labels, scale, softcap, True)
    assert torch.equal(found, without)
    error, theirs = (abs(float(value) - float(truth)) for value in (found.sum(), single))
    # A few units in the last place of fp32, in which the losses come.
    assert error <= 2 * theirs + 1e-6 * abs(float(truth)) + 1e-6
    wide = (given.double() - slope).abs().max()
    assert wide <= 1.05 * (composed.to(dtype).double() - slope).abs().max() + 1e-6
