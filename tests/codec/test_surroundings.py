"""Results depend on the arguments alone: not on the device, nor on torch's global settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fourbit import functional as F4

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def everything(device: str) -> dict[str, Tensor]:
    """One result of every function, from the same inputs."""
    generator = torch.Generator("cpu").manual_seed(3)

    def randn(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return values.to(device)

    w, x, tokens = randn(70, 101), randn(30, 101), torch.arange(30, device=device)
    found = {}
    for quant_type in ("nf4", "fp4", "int4"):
        q = F4.quantize_4bit(w, quant_type, 32, double_quant=True)
        for name in ("codes", "absmax", "nested_absmax", "offset"):
            found[f"{quant_type} {name}"] = getattr(q, name)
        found[f"{quant_type} scales"] = F4.absmax_of(q)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found[f"{quant_type} {dtype}"] = F4.dequantize_4bit(q, dtype)
    found["dropout"] = F4.keyed_dropout(x, 0.1, tokens, tokens + 2**33, layer=1, seed=2**40 + 7, step=3)
    found["few rows"] = F4.linear_4bit(x[:3], q)
    found["many rows"] = F4.linear_4bit(x, q)
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], exact_products: bool) -> None:
    for name, value in expected.items():
        result = got[name].cpu()
        assert result.dtype == value.dtype
        if exact_products or "rows" not in name:
            assert torch.equal(result, value), name
        else:
            torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-4)


@contextmanager
def loading_a_model() -> Iterator[None]:
    """What transformers sets while it builds a model."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_global_settings_do_not_matter(implementation: str) -> None:
    expected = everything("cpu")
    with loading_a_model():
        got = everything("cpu")
    assert_same(got, expected, exact_products=True)


@NEEDS_CUDA
def test_a_gpu_gives_the_same_bytes(implementation: str) -> None:
    assert_same(everything("cuda"), everything("cpu"), exact_products=False)
