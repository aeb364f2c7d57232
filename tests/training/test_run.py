from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

import fourbit
from fourbit.errors import ConfigError, TrainingError
from fourbit.nn.linear import Linear4bit
from fourbit.training import loop
from fourbit.training import run as training
from fourbit.training.guard import Guard
from fourbit.training.prepare import prepare_model
from fourbit.training.schedule import learning_rate


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def lines(folder: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def adapter_of(folder: str) -> dict[str, torch.Tensor]:
    return load_file(str(Path(folder) / "adapter" / "adapter_model.safetensors"))


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def base_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            for part in (module.weight, module.weight_absmax, module.weight_consts):
                digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def test_a_run_learns_and_leaves_everything_behind(settings: Any) -> None:
    config = settings(train__max_steps=60, train__eval_every=20)
    result = training.run(config, quiet())
    steps = [line for line in lines(config.output) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert steps[-1]["loss"] < 0.88 * steps[0]["loss"]
    assert result.metrics["heldout_loss"] == min(
        line["heldout_loss"] for line in lines(config.output) if "heldout_loss" in line
    )
    names = {path.name for path in Path(config.output).iterdir()}
    records = {"metrics.jsonl", "timing.jsonl", "summary.json", "provenance.json"}
    assert names == {"config.yaml", "checkpoints", "adapter"} | records
    assert {path.name for path in (Path(config.output) / "checkpoints").iterdir()} == {
        "step-000040",
        "step-000060",
    }
    assert set(lines(config.output, "timing.jsonl")[0]) == {
        "step",
        "seconds",
        "tokens_per_second",
        "peak_bytes",
    }


def test_the_base_is_untouched(settings: Any) -> None:
    config = settings()
    model, tokenizer = prepare_model(config, quiet())
    before = base_hash(model)
    training.train(
        model,
        tokenizer,
        config.data.train[0],
        output=config.output,
        max_steps=3,
        learning_rate=0.01,
        console=quiet(),
    )
    assert base_hash(model) == before


def test_the_same_run_twice_gives_the_same_bytes(settings: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        training.run(settings(output=str(tmp_path / name)), quiet())
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()
    assert_equal(adapter_of(str(tmp_path / "one")), adapter_of(str(tmp_path / "two")))


@pytest.mark.parametrize(
    "changes",
    [{"train__micro_batch": 1}, {"train__micro_batch": 8}, {"train__activation_checkpointing": False}],
)
def test_micro_batch_and_checkpointing_change_no_result(
    settings: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    training.run(settings(output=str(tmp_path / "one"), lora__dropout=0.2), quiet())
    training.run(settings(output=str(tmp_path / "two"), lora__dropout=0.2, **changes), quiet())
    for first, second in zip(lines(str(tmp_path / "one")), lines(str(tmp_path / "two")), strict=True):
        for key, value in first.items():
            assert second[key] == pytest.approx(value, rel=2e-4), key


def test_a_resumed_run_equals_the_uninterrupted_one(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.run(settings(output=str(tmp_path / "whole")), quiet())
    config = settings(output=str(tmp_path / "parts"))
    real, calls = loop._optimizer_step, []

    def interrupt_after_four(*args: Any) -> Any:
        calls.append(1)
        result = real(*args)
        if len(calls) == 4:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(loop, "_optimizer_step", interrupt_after_four)
    first = training.run(config, quiet())
    assert first.stopped == "interrupted"
    assert first.metrics["steps"] == 4
    second = training.run(config, quiet(), resume=True)
    assert second.stopped == "done"
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()
    assert_equal(adapter_of(str(tmp_path / "whole")), adapter_of(str(tmp_path / "parts")))


def test_resuming_with_other_settings_is_refused(settings: Any) -> None:
    training.run(settings(), quiet())
    with pytest.raises(ConfigError, match=r"cannot resume, lora\.r differs"):
        training.run(settings(lora__r=4), quiet(), resume=True)


def test_a_folder_that_holds_a_run_is_not_overwritten(settings: Any) -> None:
    training.run(settings(), quiet())
    with pytest.raises(ConfigError, match="holds a run already; --resume goes on with it"):
        training.run(settings(), quiet())
    for name in ("evaluation.json", "report.html"):
        (Path(settings().output) / name).touch()
    training.run(settings(train__max_steps=3), quiet(), overwrite=True)
    assert len([line for line in lines(settings().output) if "loss" in line]) == 3
    # What was said of the run that is gone goes with it.
    assert not {"evaluation.json", "report.html"} & {path.name for path in Path(settings().output).iterdir()}


def test_scores_stay_until_their_adapter_is_replaced(settings: Any) -> None:
    config = settings(train__max_steps=3, train__eval_every=3, data__heldout_fraction=0)
    training.run(config, quiet())
    scores = Path(config.output) / "evaluation.json"
    scores.touch()
    training.run(config, quiet(), resume=True)  # ended already
    assert scores.exists()
    training.run(
        settings(train__max_steps=6, train__eval_every=3, data__heldout_fraction=0), quiet(), resume=True
    )
    assert not scores.exists()


def test_resuming_where_there_is_nothing(settings: Any) -> None:
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        training.run(settings(), quiet(), resume=True)


def test_a_setting_that_is_gone_does_not_close_old_run_folders(settings: Any) -> None:
    """Their config.yaml and checkpoints name it; no other unknown setting is taken."""
    config = settings(train__compact_heap=True)
    assert "compact_heap" not in config.model_dump()["train"]
    with pytest.raises(ConfigError, match="compact_heep"):
        settings(train__compact_heep=True)


def test_an_evaluation_forms_no_more_logits_at_once_than_a_step(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[int] = []
    real = loop.heldout_loss
    monkeypatch.setattr(
        loop, "heldout_loss", lambda *a, chunk, **more: chunks.append(chunk) or real(*a, chunk=chunk, **more)
    )
    training.run(settings(train__max_steps=1, train__loss_chunk=3), quiet())
    assert chunks == [3]


def test_the_best_adapter_is_kept_and_a_plateau_stops(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.1])

    class Result:
        def __init__(self) -> None:
            self.loss = next(losses)

    saved = []
    monkeypatch.setattr(loop, "heldout_loss", lambda *_, **__: Result())
    real = loop.checkpoint.save_best
    monkeypatch.setattr(
        loop.checkpoint, "save_best", lambda folder, model: (saved.append(1), real(folder, model))
    )
    config = settings(train__max_steps=10, train__eval_every=1, train__early_stop_patience=2)
    result = training.run(config, quiet())
    assert result.stopped == "early"
    assert result.metrics["steps"] == 4
    assert result.metrics["best_step"] == 2
    assert len(saved) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model__quant_type": "none"},
        {"model__quant_type": "none", "lora": "none", "train__learning_rate": 0.003},
    ],
)
def test_plain_lora_and_full_fine_tuning_run_in_the_same_loop(settings: Any, changes: dict[str, Any]) -> None:
    config = settings(**{"train__max_steps": 40, "train__eval_every": 40, **changes})
    training.run(config, quiet())
    steps = [line for line in lines(config.output) if "loss" in line]
    assert steps[-1]["loss"] < 0.88 * steps[0]["loss"]
    if config.lora is None:
        model, _ = fourbit.load(Path(config.output) / "adapter", quant_type="none", compute_dtype="float32")
        assert model.fourbit_report.converted == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules_to_save_are_trained_and_saved(settings: Any, dtype: str) -> None:
    config = settings(lora__modules_to_save=["embed_tokens"], model__compute_dtype=dtype)
    training.run(config, quiet())
    assert any("embed_tokens" in name for name in adapter_of(config.output))


def test_bf16_learns_too(settings: Any) -> None:
    config = settings(train__max_steps=60, train__eval_every=60, model__compute_dtype="bfloat16")
    training.run(config, quiet())
    steps = [line for line in lines(config.output) if "loss" in line]
    assert steps[-1]["loss"] < 0.88 * steps[0]["loss"]


def test_a_step_that_is_not_finite_is_skipped_and_named(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.causal_lm_loss, []

    def broken(model: Any, batch: Any, chunk: int) -> Any:
        calls.append(1)
        total, count = real(model, batch, chunk)
        return (total * float("nan"), count) if len(calls) == 3 else (total, count)  # second step, first half

    monkeypatch.setattr(loop, "causal_lm_loss", broken)
    out = io.StringIO()
    training.run(settings(), Console(file=out, width=500))
    assert "step 2: loss is not finite, the step is skipped (rows " in out.getvalue()
    assert "train.jsonl:" in out.getvalue()
    assert all(tensor.isfinite().all() for tensor in adapter_of(settings().output).values())


def test_three_steps_in_a_row_stop_the_run(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.causal_lm_loss
    monkeypatch.setattr(loop, "causal_lm_loss", lambda m, b, c: (real(m, b, c)[0] * float("inf"), 1))
    with pytest.raises(
        TrainingError,
        match=r"step 3: loss is not finite, the third step in a row \(rows .*lower train\.learning_rate",
    ):
        training.run(settings(), quiet())


def test_a_loss_spike_warns() -> None:
    guard = Guard()
    for step in range(20):
        assert guard.check(step, 1.0, 1.0, []) == (True, None)
    apply, warning = guard.check(20, 5.0, 1.0, [])
    assert apply
    assert warning == "step 21: loss 5.000 is 5.0 times the median of the last 20 steps"
    assert Guard().check(0, 100.0, 1.0, []) == (True, None)


def test_tensorboard_gets_the_curves(settings: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(train__tensorboard=True)
    training.run(config, quiet())
    events = EventAccumulator(str(Path(config.output) / "tensorboard"))
    events.Reload()
    assert {"loss", "heldout_loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(
        events.Tags()["scalars"]
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # stock PEFT's
def test_the_python_surface(settings: Any, tmp_path: Path) -> None:
    config = settings()
    model, tokenizer = fourbit.load(config.model.path, compute_dtype="float32")
    model = fourbit.add_lora(model, r=4)
    result = fourbit.train(
        model,
        tokenizer,
        config.data.train[0],
        output=tmp_path / "api",
        max_steps=2,
        max_length=64,
        console=quiet(),
    )
    assert result.adapter.is_dir()
    fresh, _ = fourbit.load(config.model.path, compute_dtype="float32")
    assert isinstance(PeftModel.from_pretrained(fresh, str(result.adapter)), PeftModel)
    with pytest.raises(
        ConfigError, match=r"fourbit\.train: unknown setting 'epoch' \(did you mean 'epochs'\?\)"
    ):
        fourbit.train(model, tokenizer, config.data.train[0], output=tmp_path / "x", epoch=2, console=quiet())
    with pytest.raises(ConfigError, match="nothing in this model is trainable"):
        fourbit.train(
            fourbit.load(config.model.path)[0],
            tokenizer,
            config.data.train[0],
            output=tmp_path / "x",
            console=quiet(),
        )


def test_a_dry_run_writes_nothing(settings: Any) -> None:
    config = settings()
    result = training.dry_run(config, quiet())
    assert result["steps"] == 6
    assert result["train_rows"] == 24
    assert result["heldout_rows"] == 8
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 7 / 8, 6 / 8]),
        ("cosine", [0.5, 1.0, 1.0, 0.9619397662556434, 0.8535533905932737]),
    ],
)
def test_schedules(schedule: str, rates: list[float]) -> None:
    assert [learning_rate(step, 10, 1.0, 0.2, schedule) for step in range(5)] == pytest.approx(rates)
