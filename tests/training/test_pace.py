"""How long a run will take: arithmetic by a clock of our own, and a model that timing leaves as it was."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fourbit
from fourbit.config import TrainSettings
from fourbit.config_file import resolve
from fourbit.data.render import Example
from fourbit.errors import ModelError
from fourbit.training import pace
from fourbit.training.pace import measure_pace, step_seconds
from fourbit.training.run import run
from tests.tiny import byte_tokenizer, llama, save_llama


def rows(*lengths: int) -> list[Example]:
    return [Example([1] * n, [False] + [True] * (n - 1), i, f"x:{i}", 1) for i, n in enumerate(lengths)]


class Clock:
    """Time that passes only as layers and the loss are computed."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, layer: float, around: float, fixed: float = 0.0
    ) -> None:
        self.now = 0.0
        real = pace.causal_lm_loss

        def computed(model: Any, batch: Any, *chunk: int) -> Any:
            layers = len(model.get_base_model().model.layers)
            assert model.config.num_hidden_layers == layers
            self.now += (layers * layer + around) * batch.input_ids.numel() + fixed
            return real(model, batch, *chunk)

        monkeypatch.setattr(pace, "causal_lm_loss", computed)
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)


@pytest.fixture
def model() -> Any:
    made = fourbit.add_lora(llama(layers=6), r=4)
    made.get_base_model().config.pad_token_id = 0
    return made


def test_layers_and_what_is_around_them_add_up(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, layer=2e-4, around=1e-3, fixed=0.01)
    settings = TrainSettings(micro_batch=1, effective_batch=4)
    found = measure_pace(model, settings, rows(16, 32, 64, 128), rows(16, 32, 64, 128))
    token = 6 * 2e-4 + 1e-3
    assert found.token == pytest.approx(token)
    assert found.batch == pytest.approx(0.01)
    assert found.scored == pytest.approx(token, rel=0.02)
    assert found.step(settings, rows(16, 32, 64, 128)) == pytest.approx(4 * 0.01 + 240 * token)
    assert measure_pace(model, settings, rows(16, 32)).scored == 0.0  # nothing will be
    longer = TrainSettings(micro_batch=1, effective_batch=4, epochs=3, eval_every=2)
    whole = found.run(longer, rows(16, 32, 64, 128), rows(10))
    assert whole == pytest.approx(3 * (4 * 0.01 + 240 * token) + 2 * 10 * found.scored)


def test_slow_layers_are_timed_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, layer=1.0, around=0.5)
    found = measure_pace(model, TrainSettings(micro_batch=1), rows(16, 32))
    assert found.token == pytest.approx(6.5)
    assert clock.now == pytest.approx(2 * 32 * (1.5 + 2.5))
    assert found.scored == pytest.approx(6.5 / 4)


def test_a_deeper_model_than_is_there(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, layer=2e-4, around=1e-3)
    assert measure_pace(model, TrainSettings(), rows(32), depth=60).token == pytest.approx(60 * 2e-4 + 1e-3)


def test_a_model_is_as_it_was(model: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = list(model.get_base_model().model.layers)
    measure_pace(model, TrainSettings(packing=32), rows(8, 16, 24))
    assert list(model.get_base_model().model.layers) == layers
    assert model.config.num_hidden_layers == 6
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_fails_is_one_line(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ValueError("no such layer\nat all")

    monkeypatch.setattr(pace, "causal_lm_loss", broken)
    with pytest.raises(ModelError, match=r"^time of LlamaForCausalLM cannot be predicted \(no such layer\)$"):
        measure_pace(model, TrainSettings(), rows(8))
    assert len(model.get_base_model().model.layers) == 6


def test_a_failure_leaves_no_gradients(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on after it: what the loss has added before must not reach the first step."""
    real = pace.causal_lm_loss

    def failing_late(*args: Any) -> Any:
        loss, count = real(*args)
        next(p for p in model.parameters() if p.requires_grad).register_hook(_raise)
        return loss, count

    def _raise(grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(pace, "causal_lm_loss", failing_late)
    with pytest.raises(ModelError, match="no memory"):
        measure_pace(model, TrainSettings(), rows(8))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_says_it_and_comes_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourbit.training.planner.runtime_bytes", lambda *_: 10**8)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}", "completion": "a"}) + "\n" for n in range(20)))
    tree = {
        "model": {"path": str(save_llama(tmp_path / "model")), "device": "cpu"},
        "data": {"train": str(data)},
        "train": {"effective_batch": 4, "max_steps": 2},
    }
    out = io.StringIO()
    said = run(
        resolve({**tree, "output": str(tmp_path / "said")}), Console(file=out, width=100), predict=True
    )
    run(resolve({**tree, "output": str(tmp_path / "silent")}), Console(file=io.StringIO()))
    assert "time: about 0:0" in out.getvalue()
    assert 0 < said.metrics["predicted_seconds"] < 60
    assert (tmp_path / "said/metrics.jsonl").read_text() == (tmp_path / "silent/metrics.jsonl").read_text()


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_shape_alone(quant: str, tmp_path: Path) -> None:
    """From a config without weights."""
    llama(layers=6).config.save_pretrained(str(tmp_path))
    byte_tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps(
            {**json.loads((tmp_path / "config.json").read_text()), "architectures": ["LlamaForCausalLM"]}
        )
    )
    tree = {
        "model": {"path": str(tmp_path), "quant_type": quant, "device": "cpu"},
        "data": {"train": "x", "max_length": 16},
    }
    assert 0 < step_seconds(resolve(tree)) < 60
