"""Rows times a packed weight: no further from fp64 than torch on the restored weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from fourbit import reference
from fourbit.codebooks import codebook
from fourbit.kernels.gpu import product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize(("features", "width"), [(7, 64), (40, 130), (33, 576)])
@pytest.mark.parametrize("double", [False, True], ids=["scales", "double"])
def test_few_against_fp64(
    dtype: torch.dtype, rows: int, features: int, width: int, double: bool, device: torch.device
) -> None:
    check(product.linear_4bit, dtype, rows, features, width, double, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "features", "width"), [(3, 7, 64), (130, 40, 130), (128, 257, 64)])
@pytest.mark.parametrize("double", [False, True], ids=["scales", "double"])
def test_many_against_fp64(
    dtype: torch.dtype, rows: int, features: int, width: int, double: bool, device: torch.device
) -> None:
    check(product.many_rows, dtype, rows, features, width, double, device)


def check(
    multiply: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    rows: int,
    features: int,
    width: int,
    double: bool,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(features)
    w = torch.randn(features, width, generator=generator).to(device)
    x = torch.randn(rows, width, generator=generator).to(device, dtype)
    bias = torch.randn(features, generator=generator).to(device, dtype) if double else None
    values = codebook("nf4", device)
    codes, absmax = reference.quantize_4bit(w, values, 64)
    parts: tuple[torch.Tensor | None, ...] = (absmax, None, None)
    if double:
        parts = reference.quantize_absmax(absmax)
        absmax = reference.dequantize_absmax(*parts)
    y = multiply(x, codes, *parts, values, 64, features, bias)
    restored = reference.dequantize_4bit(codes, absmax, (features, width), values, 64, dtype)
    truth = F.linear(x.double(), restored.double(), None if bias is None else bias.double())
    assert (y.shape, y.dtype) == ((rows, features), dtype)
    error = (y.double() - truth).abs().max()
    assert error <= (F.linear(x, restored, bias).double() - truth).abs().max() * 1.5 + 1e-5
