"""A run killed anywhere and resumed equals the one that was never stopped."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fourbit.config import RunConfig
from fourbit.training import checkpoint
from tests.training.contents import assert_same, contents
from tests.training.runner import Runner, make_run, write_run

#: Evaluations, checkpoints and a better adapter often; dropout, accumulation, an end on a plateau.
BUSY = {
    "train__max_steps": 40,
    "train__eval_every": 3,
    "train__early_stop_patience": 3,
    "train__learning_rate": 1.0,
    "train__schedule": "cosine",
    "lora__dropout": 0.2,
    "lora__r": 4,
}


def survive(runner: Runner, make: Any, folder: Path, kills: int, seed: int) -> int:
    """Run, kill at random moments and resume, until so many kills; returns how many runs were compared.

    A moment is drawn from the time that a whole run takes. A run that ends before its kill is compared with
    the uninterrupted one, and the next one begins.
    """
    draw = random.Random(seed)
    whole = make(**BUSY, output=str(folder / "whole"))
    seconds = runner.run(whole).seconds
    assert contents(whole.output)["summary.json"]["stopped"] == "early"
    compared = 0
    while kills > 0:
        config = make(**BUSY, output=str(folder / f"killed-{compared}"))
        while True:
            pid = runner.start(config, resume=(Path(config.output) / "config.yaml").exists())
            ended = runner.wait(pid, after=draw.uniform(0, seconds) if kills > 0 else None)
            if ended.status != -signal.SIGKILL:
                assert ended.status == 0, ended.output
                break
            kills -= 1
        assert_same(whole.output, config.output)
        compared += 1
    return compared


def test_three_kills_at_random_moments(runner: Runner, settings: Any, tmp_path: Path) -> None:
    assert survive(runner, settings, tmp_path, kills=3, seed=0) >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_25_kills_at_random_moments(runner: Runner, settings: Any, tmp_path: Path) -> None:
    assert survive(runner, settings, tmp_path, kills=25, seed=1) >= 1


def test_a_save_killed_at_each_of_its_file_operations_loses_nothing(runner: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, *make_run(step=1))
    write_run(tmp_path / "next", *make_run(step=2))
    adapters = [
        (path / "adapter/adapter_model.safetensors").read_bytes() for path in (folder, tmp_path / "next")
    ]
    ended = runner.wait(runner.request("killed_saves", folder=str(folder)))
    assert ended.status == 0, ended.output
    copies = sorted(tmp_path.glob("run-*"), key=lambda path: int(path.name.removeprefix("run-")))
    assert len(copies) > 50
    steps = []
    for copy in copies:
        # The adapter a user keeps is there at every moment, the old or the new one, before any clearing up.
        assert (copy / "adapter/adapter_model.safetensors").read_bytes() in adapters, copy
        assert (copy / "adapter/adapter_config.json").exists(), copy
        notes: list[str] = []
        saved = checkpoint.newest(copy, notes.append)
        assert saved is not None
        assert notes == []
        steps.append(saved.state.progress.step)
        assert saved.path.name == f"step-{steps[-1]:06d}"
        assert list(copy.glob("*.partial")) == list((copy / "checkpoints").glob("*.partial")) == []
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}
    assert [path.name for path in (copies[-1] / "checkpoints").iterdir()] == ["step-000002"]


def test_sigterm_saves_and_stops(runner: Runner, settings: Any, tmp_path: Path) -> None:
    config = settings(train__max_steps=40, train__eval_every=100, output=str(tmp_path / "stopped"))
    pid = runner.start(config)
    _wait_for_steps(config, 2)
    ended = runner.wait(pid, signal.SIGTERM, after=0)
    assert ended.status == 130, ended.output
    steps = contents(config.output)["summary.json"]["steps"]
    assert 2 <= steps < 40
    assert [path.name for path in (Path(config.output) / "checkpoints").iterdir()] == [f"step-{steps:06d}"]
    assert runner.run(config, resume=True).status == 0
    whole = settings(train__max_steps=40, train__eval_every=100, output=str(tmp_path / "whole"))
    assert runner.run(whole).status == 0
    # The interrupted run has one checkpoint more, that of its stop.
    keep = [name for name in contents(config.output) if f"step-{steps:06d}" not in name]
    one, two = contents(whole.output), contents(config.output)
    assert sorted(one) == sorted(keep)
    assert [name for name in keep if one[name] != two[name]] == []


def _wait_for_steps(config: RunConfig, steps: int) -> None:
    metrics = Path(config.output) / "metrics.jsonl"
    until = time.monotonic() + 240
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_full_disk_loses_nothing(runner: Runner, settings: Any, tmp_path: Path) -> None:
    whole = settings(lora__r=4, output=str(tmp_path / "whole"))
    assert runner.run(whole).status == 0
    config = settings(lora__r=4, output=str(tmp_path / "full"))
    ended = runner.run(config, full_disk_at_save=2)
    assert ended.status == 6
    error = ended.output.strip().splitlines()[-1]
    assert "step-000006 cannot be written" in error
    assert "File too large" in error
    assert "what was saved before is whole: put that right, then go on with --resume" in error
    folder = Path(config.output)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000003"]
    assert checkpoint.newest(folder, lambda _: None) is not None
    ended = runner.run(config, resume=True)
    assert ended.status == 0, ended.output
    assert_same(whole.output, config.output)
