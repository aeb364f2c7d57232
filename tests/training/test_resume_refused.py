"""What may change between a run and its resumption, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fourbit.config import RunConfig
from fourbit.errors import ConfigError
from fourbit.kernels import native
from fourbit.training import checkpoint, identity, loop
from fourbit.training.prepare import prepare_data, prepare_model
from tests.tiny import llama
from tests.training.contents import contents
from tests.training.test_resume import trained


def record_of(config: RunConfig) -> identity.Record:
    quiet = Console(file=io.StringIO())
    model, tokenizer = prepare_model(config, quiet)
    _, examples, heldout = prepare_data(config, tokenizer, quiet)
    rate = config.train.learning_rate
    return identity.describe(
        config,
        model,
        examples,
        heldout,
        peak_rate=2e-4 if rate == "auto" else rate,
        steps=loop.steps_in_run(len(examples), config.train),
        autocast_dtype=None,
    )


def state_of(config: RunConfig, step: int = 4, evaluated: int = 3) -> checkpoint.State:
    record = record_of(config)
    progress = checkpoint.Progress(step=step, evaluated_step=evaluated)
    # As a checkpoint gives it back.
    return checkpoint.State(
        progress,
        {},
        0,
        json.loads(json.dumps(record.settings)),
        json.loads(json.dumps(record.identity)),
    )


DECAY = ", which changes the learning rate of steps already done"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora__r": 4}, ["lora.r differs from the run's (16, now 4)"]),
        ({"lora": "none", "model__quant_type": "none"}, None),
        ({"lora__target_modules": ["q_proj"]}, None),
        ({"model__quant_type": "fp4"}, ["model.quant_type differs from the run's (nf4, now fp4)"]),
        ({"model__double_quant": False}, ["model.double_quant differs from the run's (True, now False)"]),
        (
            {"model__compute_dtype": "bfloat16"},
            ["model.compute_dtype differs from the run's (float32, now bfloat16)"],
        ),
        ({"data__max_length": 36}, None),
        ({"data__heldout_fraction": 0.5}, None),
        ({"train__seed": 1}, ["train.seed differs from the run's (0, now 1)"]),
        ({"train__micro_batch": 2}, ["train.micro_batch differs from the run's (4, now 2)"]),
        ({"train__weight_decay": 0.1}, ["train.weight_decay differs from the run's (0.0, now 0.1)"]),
        ({"train__eval_every": 2}, ["train.eval_every differs from the run's (3, now 2)"]),
        ({"train__deterministic": False}, ["train.deterministic differs from the run's (True, now False)"]),
        ({"train__early_stop_patience": 2}, ["train.early_stop_patience differs from the run's (5, now 2)"]),
        (
            {"train__max_steps": 3},
            ["train.max_steps differs from the run's (6, now 3), which ends before the 4 steps already done"],
        ),
        ({"train__max_steps": 40}, ["train.max_steps differs from the run's (6, now 40)" + DECAY]),  # warmup
        (
            {"train__learning_rate": 0.02},
            ["train.learning_rate differs from the run's (0.01, now 0.02)" + DECAY],
        ),
        (
            {"train__schedule": "linear"},
            ["train.schedule differs from the run's (constant, now linear)" + DECAY],
        ),
        (
            {"train__warmup_ratio": 0.5},
            ["train.warmup_ratio differs from the run's (0.03, now 0.5)" + DECAY],
        ),
    ],
)
def test_settings_that_must_not_change(
    settings: Any, changes: dict[str, Any], named: list[str] | None
) -> None:
    stored = state_of(settings(train__early_stop_patience=5))
    now = record_of(settings(**{"train__early_stop_patience": 5, **changes}))
    found = identity.differences(stored, now)
    if named is not None:
        assert found == named
    for key in changes:
        assert any(line.startswith(key.replace("__", ".")) for line in found), found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__tensorboard": True, "train__keep_checkpoints": 5, "eval__batch_size": 2},
        {"output": "elsewhere"},
        {"train__max_steps": 33},  # its warmup is one step too
        {"train__max_steps": 4},
        {"train__epochs": 2},
        {"train__max_steps": 40, "train__warmup_ratio": 0.02},
        {"train__early_stop_patience": 6},
        {"train__early_stop_patience": None},
        {"data__max_length": 1000},  # no row was too long
    ],
)
def test_settings_that_may_change(settings: Any, changes: dict[str, Any]) -> None:
    stored = state_of(settings(train__early_stop_patience=5))
    now = record_of(settings(**{"train__early_stop_patience": 5, **changes}))
    assert identity.differences(stored, now) == identity.remarks(stored, now) == []


def test_contents_count_and_not_paths(settings: Any, tmp_path: Path, data: Path) -> None:
    stored = state_of(settings())
    (tmp_path / "model").rename(tmp_path / "moved")
    data.rename(tmp_path / "moved.jsonl")
    moved = {"model__path": str(tmp_path / "moved"), "data__train": str(tmp_path / "moved.jsonl")}
    assert identity.differences(stored, record_of(settings(**moved))) == []


def test_changed_rows_are_refused(settings: Any, data: Path) -> None:
    config = settings()
    stored = state_of(config)
    rows = data.read_text()
    data.write_text(rows.replace("gold", "pink", 1))
    (found,) = identity.differences(stored, record_of(config))
    assert found in (
        "the content of data.train differs from the run's",
        "the content of the held-out rows differs from the run's",
    )
    data.write_text("".join(reversed(rows.splitlines(keepends=True))))
    assert "the content of data.train differs from the run's" in identity.differences(
        stored, record_of(config)
    )


def test_a_changed_base_is_refused(settings: Any, tmp_path: Path) -> None:
    config = settings()
    stored = state_of(config)
    llama(seed=1).to(torch.bfloat16).save_pretrained(str(tmp_path / "model"))
    assert identity.differences(stored, record_of(config)) == [
        "the content of model.path differs from the run's"
    ]


def test_machine_and_versions(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    stored = state_of(config)
    threads, isa = torch.get_num_threads(), native.isa()
    other = next(name for name in native.isas() if name != isa)
    versions = identity.versions()
    try:
        torch.set_num_threads(threads + 1)
        native.set_isa(other)
        monkeypatch.setattr(
            identity, "versions", lambda: {**versions, "torch": "9.9", "code": "0", "peft": "1.0"}
        )
        now = record_of(config)
    finally:
        torch.set_num_threads(threads)
        native.set_isa(isa)
    capability = torch.backends.cpu.get_cpu_capability()
    assert identity.differences(stored, now) == [
        f"the number of threads differs from the run's ({threads}, now {threads + 1})",
        f"the instruction set differs from the run's "
        f"({isa}, torch {capability}, now {other}, torch {capability})",
        f"the version of torch differs from the run's ({versions['torch']}, now 9.9)",
        f"the version of peft differs from the run's ({versions['peft']}, now 1.0)",
    ]
    assert len(identity.remarks(stored, now)) == 1
    assert identity.remarks(stored, now)[0].startswith(
        "fourbit's code is another one than when the run began"
    )


def test_a_refused_resume_changes_nothing(settings: Any) -> None:
    config = settings()
    trained(config)
    before = contents(config.output)
    with pytest.raises(
        ConfigError,
        match=r"cannot resume, lora\.r differs from the run's \(16, now 4\); train\.seed differs .* restore",
    ):
        trained(settings(lora__r=4, train__seed=3), resume=True)
    assert contents(config.output) == before
