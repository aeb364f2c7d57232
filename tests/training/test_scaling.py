"""The factor on the loss in fp16: the gradients are those without it, and it follows what they can bear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fourbit.training import loop, scaling
from fourbit.training.run import run
from fourbit.training.scaling import LossScale


@pytest.fixture
def as_in_fp16(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have runs scale their loss as in fp16, whose products no CPU computes well; None leaves them alone."""

    def use(first: float) -> None:
        class Scale(LossScale):
            def __init__(self, dtype: torch.dtype, state: dict[str, Any] | None = None) -> None:
                super().__init__(torch.float16, state)

        monkeypatch.setattr(scaling, "_FIRST", first)
        monkeypatch.setattr(loop, "LossScale", Scale)

    return use


def factors(folder: Path) -> list[float]:
    """Of each checkpoint, in order."""
    found = sorted((folder / "checkpoints").glob("step-*/state.json"))
    return [json.loads(path.read_text())["loss_scale"]["factor"] for path in found]


def assert_alike(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_power_of_two_changes_no_bit(settings: Any, tmp_path: Path, as_in_fp16: Any) -> None:
    run(settings(output=str(tmp_path / "plain"), lora__dropout=0.2), Console(quiet=True))
    as_in_fp16(2.0**16)
    run(settings(output=str(tmp_path / "scaled"), lora__dropout=0.2), Console(quiet=True))
    assert factors(tmp_path / "plain") == [1.0, 1.0]
    assert factors(tmp_path / "scaled") == [2.0**16] * 2
    assert_alike(tmp_path / "plain", tmp_path / "scaled")


def test_gradients_that_overflow_are_computed_again_with_half(
    settings: Any, tmp_path: Path, as_in_fp16: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows and dropout, so the run is the one whose factor was small enough from the beginning."""
    real, calls = loop.causal_lm_loss, []

    def overflowing(model: Any, *rest: Any) -> Any:
        loss, count = real(model, *rest)
        calls.append(count)
        if loss.requires_grad:
            loss.register_hook(lambda grad: grad * (torch.inf if grad.abs() * count > 2000 else 1.0))
        return loss, count

    run(settings(output=str(tmp_path / "plain")), Console(quiet=True))
    monkeypatch.setattr(loop, "causal_lm_loss", overflowing)
    as_in_fp16(2.0**16)
    run(settings(output=str(tmp_path / "scaled")), Console(quiet=True))
    assert len(calls) > 12
    assert 1.0 < factors(tmp_path / "scaled")[-1] < 2.0**12
    assert_alike(tmp_path / "plain", tmp_path / "scaled")


def test_it_is_taken_up_again(
    settings: Any, tmp_path: Path, as_in_fp16: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_in_fp16(4.0)
    monkeypatch.setattr(scaling, "_GROWING_AFTER", 4)
    run(settings(output=str(tmp_path / "whole")), Console(quiet=True))
    assert factors(tmp_path / "whole") == [4.0, 8.0]
    run(settings(output=str(tmp_path / "parts"), train__max_steps=3), Console(quiet=True))
    run(settings(output=str(tmp_path / "parts")), Console(quiet=True), resume=True)
    assert factors(tmp_path / "parts") == [4.0, 8.0]
    assert_alike(tmp_path / "whole", tmp_path / "parts")


def test_numbers() -> None:
    plain = LossScale(torch.bfloat16)
    assert plain.factor == 1.0
    assert not plain.lower()
    scale = LossScale(torch.float16)
    assert scale.factor == 2.0**16
    assert sum(scale.lower() for _ in range(20)) == 16
    assert scale.factor == 1.0
    for _ in range(2000):
        scale.count()
    assert scale.factor == 2.0
    assert LossScale(torch.float16, scale.state()).state() == {"factor": 2.0, "good": 0}
