"""Experiment trackers: what they are told, how a run goes on in them, and that none can end it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from rich.console import Console

from fourbit.errors import ConfigError
from fourbit.training import run as training
from fourbit.training import trackers


def quiet() -> Console:
    return Console(quiet=True)


class Recorder(GeneralTracker):
    """Stands for a tracker's library, as accelerate wraps one, and remembers what it was given."""

    name, requires_logging_directory, main_process_only = "wandb", False, False
    made: list[Recorder] = []  # noqa: RUF012 - of the class on purpose

    def __init__(self, project: str, **settings: Any) -> None:
        super().__init__()
        self.project, self.settings, self.finished = project, settings, False
        self.shown: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.made.append(self)

    def start(self) -> None:
        pass

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.shown = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


class Failing(Recorder):
    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        if step == 2:
            raise OSError("the server is gone\nand more")
        super().log(values, step, **more)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else name)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


def test_curves_and_settings_but_nothing_of_the_data(settings: Any, made: list[Recorder]) -> None:
    config = settings(train__trackers="wandb")
    training.run(config, quiet())
    (one,) = made
    assert [step for step, _ in one.logged] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= one.logged[0][1].keys()
    assert "heldout_loss" in one.logged[3][1]
    assert one.finished
    assert one.shown["model.path"] == "model"
    assert one.shown["lora.r"] == config.lora.r
    assert {key.partition(".")[0] for key in one.shown} == {"model", "lora", "train"}
    assert all(isinstance(value, str | int | float | None) for value in one.shown.values())


def test_a_resumed_run_goes_on_under_its_name(settings: Any, made: list[Recorder]) -> None:
    config = settings(
        train__trackers="wandb", train__max_steps=3, train__schedule="constant", train__warmup_ratio=0
    )
    training.run(config, quiet())
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 6})})
    training.run(longer, quiet(), resume=True)
    first, second = made
    assert first.settings == second.settings
    assert first.settings["name"] == "run"
    assert [step for step, _ in second.logged] == [4, 5, 6, 6]
    training.run(config, quiet(), overwrite=True)
    assert made[2].settings["id"] != first.settings["id"]


def test_one_that_fails_is_given_up_and_the_run_ends_well(
    settings: Any, made: list[Recorder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    result = training.run(settings(train__trackers="wandb"), quiet())
    assert [step for step, _ in made[0].logged] == [1]
    assert caplog.messages.count("step 2: wandb gets nothing more of this run: the server is gone") == 1
    assert result.metrics["steps"] == 6


def test_one_that_is_missing_or_does_not_start_is_an_error_before_the_first_step(
    settings: Any, made: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"train\.trackers: mlflow is not installed; pip install mlflow"):
        training.run(settings(train__trackers=["wandb", "mlflow"]), quiet())
    assert not made

    def refused(self: Recorder) -> None:
        raise RuntimeError("no key\n...")

    monkeypatch.setattr(Recorder, "start", refused)
    config = settings(train__trackers="wandb")
    with pytest.raises(ConfigError, match=r"train\.trackers: wandb did not start: no key$"):
        training.run(config, quiet())
    assert not (Path(config.output) / "metrics.jsonl").exists()


def test_a_broken_note_of_names_is_one_line(settings: Any, made: list[Recorder]) -> None:
    config = settings(train__trackers="wandb")
    training.run(config, quiet())
    note = Path(config.output) / trackers.FILE
    assert json.loads(note.read_text()).keys() == {"wandb"}
    for broken in ("{", "[]"):
        note.write_text(broken)
        with pytest.raises(ConfigError, match="is not a JSON object; remove it"):
            trackers.Trackers(config, Path(config.output))


def test_what_is_imported_for_curves_counts_as_memory(settings: Any, made: list[Recorder]) -> None:
    named = settings(train__trackers=["wandb", "mlflow"], train__tensorboard=True)
    assert trackers.libraries_of(named.train) == ["wandb", "torch.utils.tensorboard"]  # mlflow is not there
    assert trackers.libraries_of(settings().train) == []
