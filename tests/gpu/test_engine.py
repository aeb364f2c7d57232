"""Operators, adapters and steps through Triton's kernels are those through the reference."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fourbit import functional as F4
from fourbit.data.batch import collate
from fourbit.data.render import Example
from fourbit.kernels.gpu import codec, dropout, loss, optimizer, product
from fourbit.model.adapters import add_lora, key_source
from fourbit.model.load import load
from fourbit.nn.loss import causal_lm_loss
from fourbit.ops import library
from fourbit.optim import PagedAdamW
from tests.gpu.conftest import DEVICE
from tests.tiny import save_llama

KERNELS = {
    codec: ("quantize_4bit", "dequantize_4bit"),
    product: ("linear_4bit",),
    dropout: ("dropout",),
    loss: ("cross_entropy",),
    optimizer: ("adamw", "adamw_8bit"),
}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """engine(True) has Triton's kernels run, engine(False) the reference; returns the names of what ran."""
    ran: set[str] = set()

    def counted(name: str, kernel: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            ran.add(name)
            return kernel(*args, **kwargs)

        return run

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    monkeypatch.setattr(library, "_native_loaded", lambda: False)

    def use(triton: bool) -> set[str]:
        monkeypatch.setattr(library, "_TRITON_DEVICES", ("cpu", "cuda") if triton else ())
        ran.clear()
        return ran

    yield use
    library._triton_works.cache_clear()


def both(engine: Any, compute: Any, kernels: set[str]) -> tuple[Any, Any]:
    engine(False)
    wanted = compute()
    ran = engine(True)
    found = compute()
    assert ran >= kernels
    return found, wanted


@pytest.mark.parametrize("double", [False, True], ids=["scales", "double"])
def test_the_codec(engine: Any, double: bool) -> None:
    w = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def compute() -> list[torch.Tensor]:
        q = F4.quantize_4bit(w, double_quant=double)
        restored = [F4.dequantize_4bit(q, dtype) for dtype in (torch.float32, torch.bfloat16)]
        return [q.codes, q.absmax, *restored]

    found, wanted = both(engine, compute, {"quantize_4bit", "dequantize_4bit"})
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("rows", [3, 100])
def test_products_and_their_gradients(engine: Any, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = F4.quantize_4bit(torch.randn(24, 64, generator=generator).to(DEVICE))
    given = torch.randn(rows, 64, generator=generator).to(DEVICE)

    def compute() -> list[torch.Tensor]:
        x = given.clone().requires_grad_()
        y = F4.linear_4bit(x, q)
        y.square().sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad]

    found, wanted = both(engine, compute, {"linear_4bit" if rows == 3 else "dequantize_4bit"})
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("bits", [32, 8])
def test_training(engine: Any, bits: int, tmp_path: Any) -> None:
    """Two steps with dropout: loading, losses and adapters."""
    save_llama(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in (9, 14)]
    batch = collate([Example(ids, [True] * len(ids), n, "r", 0) for n, ids in enumerate(rows)], 0).to(DEVICE)

    def compute() -> list[torch.Tensor]:
        base, _ = load(str(tmp_path / "model"), compute_dtype="float32", device=DEVICE.type)
        model = add_lora(base, r=4, dropout=0.2, seed=0)
        weights = [p for p in model.parameters() if p.requires_grad]
        steps, keys = PagedAdamW(weights, lr=1e-2, bits=bits), key_source(model)
        assert keys is not None
        model.train()
        losses = []
        for step in range(2):
            keys.set(0, step, batch.rows, batch.position_ids)
            total, _ = causal_lm_loss(model, batch)
            total.backward()
            steps.step()
            steps.zero_grad()
            losses.append(total.detach())
        steps.close()
        return [*losses, *(weight.detach() for weight in weights)]

    optimizers = {"adamw" if bits == 32 else "adamw_8bit"}
    kernels = {"quantize_4bit", "dequantize_4bit", "linear_4bit", "dropout", "cross_entropy"}
    found, wanted = both(engine, compute, kernels | optimizers)
    for ours, theirs in zip(found, wanted, strict=True):
        # A moment's sign may turn where a gradient is all rounding.
        close = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.99


def test_kernels_that_do_not_work_are_told_once(
    engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("type bf16 not supported in this architecture\nmore")

    monkeypatch.setattr(codec, "quantize_4bit", refuse)
    engine(True)
    w = torch.randn(4, 64).to(DEVICE)
    with caplog.at_level(logging.WARNING, logger="fourbit"):
        for _ in range(2):
            F4.dequantize_4bit(F4.quantize_4bit(w))
    (record,) = caplog.records
    assert "Triton is not used on" in record.getMessage()
    assert record.getMessage().endswith("type bf16 not supported in this architecture")


def test_kernels_that_are_wrong_are_not_used(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = codec.quantize_4bit
    monkeypatch.setattr(codec, "quantize_4bit", lambda *args: right(*args) * 1.0001)
    engine(True)
    assert library.triton_error(DEVICE) == "its codes are not the reference's"
