"""The operators as torch sees them: schema, fakes, autograd, compilation, and the choice of code."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from fourbit import functional as F4
from fourbit.kernels import native
from fourbit.nn.linear import Linear4bit
from fourbit.ops import library

OPS = torch.ops.fourbit


@pytest.mark.parametrize(
    ("double_quant", "rows", "dtype"), [(True, 3, torch.float32), (False, 40, torch.bfloat16)], ids=str
)
def test_opcheck(double_quant: bool, rows: int, dtype: torch.dtype) -> None:
    w = torch.randn(24, 96).to(dtype)
    q = F4.quantize_4bit(w, double_quant=double_quant)
    parts = (q.codes, q.absmax, q.nested_absmax, q.offset, q.codebook, q.block_size)
    x = torch.randn(rows, 96).to(dtype).requires_grad_()
    grad = torch.randn(rows, 24).to(dtype).requires_grad_()
    bias = torch.randn(24).to(dtype).requires_grad_()
    tokens = torch.arange(rows)
    cases = [
        (OPS.quantize_4bit, (w, q.codebook, 32)),
        (OPS.dequantize_4bit, (*parts, [24, 96], dtype)),
        (OPS.linear_4bit, (x, *parts, 24, bias)),
        (OPS.linear_4bit, (x, *parts, 24, None)),
        (OPS.linear_4bit_backward, (grad, *parts, 96)),
        (OPS.keyed_dropout, (x, 0.1, tokens, tokens, 1, 2, 3)),
    ]
    if double_quant:
        cases.append((OPS.dequantize_absmax, (q.absmax, q.nested_absmax, q.offset)))
    else:
        cases.append((OPS.quantize_absmax, (q.absmax,)))
    for op, arguments in cases:
        torch.library.opcheck(op.default, arguments)


def test_fakes_give_the_shapes(implementation: str) -> None:
    for numel, block_size in ((1, 32), (65, 64), (4096, 64), (70_001, 128)):
        w = torch.randn(numel)
        q = F4.quantize_4bit(w, block_size=block_size, double_quant=True)
        codes, absmax = OPS.quantize_4bit(w.to("meta"), q.codebook.to("meta"), block_size)
        codes8, nested, offset = OPS.quantize_absmax(absmax)
        for fake, real in (
            (codes, q.codes),
            (codes8, q.absmax),
            (nested, q.nested_absmax),
            (offset, q.offset),
        ):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("codebook", [None, torch.linspace(-1, 1, 16)], ids=["nf4", "custom"])
def test_a_layer_compiles_into_one_graph(
    compute_dtype: torch.dtype | None, codebook: torch.Tensor | None
) -> None:
    layer = Linear4bit.from_linear(nn.Linear(96, 32), compute_dtype=compute_dtype, codebook=codebook)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in (2, 30):
        x = torch.randn(rows, 96, requires_grad=True)
        y = compiled(x)
        y.square().sum().backward()
        traced, x.grad = x.grad, None
        expected = layer(x)
        expected.square().sum().backward()
        assert torch.equal(y, expected)
        assert torch.equal(traced, x.grad)


def test_falling_back_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "load_error", lambda: "libfourbit.so is not there")
    library._native_loaded.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="fourbit"):
            first = F4.quantize_4bit(torch.ones(64))
            F4.dequantize_4bit(first)
    finally:
        library._native_loaded.cache_clear()
    (record,) = caplog.records
    assert record.getMessage() == (
        "the native library is not used, the reference runs instead, slower and with the same results: "
        "libfourbit.so is not there"
    )
