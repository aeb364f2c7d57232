"""A folder to stand in, with tiny models and a data file, and the `fourbit` command in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fourbit.cli.main import main
from tests.tiny import byte_tokenizer, save_llama

Fourbit = Callable[..., tuple[int, str, str]]
ROWS = "".join(
    json.dumps({"prompt": f"color {i}?", "completion": word}) + "\n"
    for i, word in enumerate(("red", "blue", "green", "black", "white", "pink", "gray", "gold") * 2)
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model: a whole one; plain: without a chat template; cut: its weights end too early."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("model", "plain", "cut", "mute"):
        save_llama(folder / name)
    (folder / "plain" / "chat_template.jinja").unlink()
    byte_tokenizer(chat=False).save_pretrained(str(folder / "plain"))
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for file in (folder / "mute").glob("tokenizer*"):
        file.unlink()
    return folder


@pytest.fixture
def here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test; the models and rows.jsonl lie in it."""
    furnish(tmp_path, models)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def furnish(folder: Path, models: Path) -> None:
    """Put the models and rows.jsonl into a folder."""
    for model in models.iterdir():
        (folder / model.name).symlink_to(model)
    (folder / "rows.jsonl").write_text(ROWS)


def train_in(folder: Path, words: list[str]) -> Path:
    """`fourbit train` in a folder, for several tests to copy; its run folder is `run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fourbit.training.run.open_budget", lambda config, memory, console: None)
        assert main(["train", *words]) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def planning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings are planned first only in tests marked `planned`: it takes as long as a tiny training.

    There, no process of its own measures an empty run.
    """
    if request.node.get_closest_marker("planned"):
        monkeypatch.setattr("fourbit.training.planner.runtime_bytes", lambda *_: 500_000_000)
    else:
        monkeypatch.setattr("fourbit.training.run.open_budget", lambda config, memory, console: None)


@pytest.fixture
def fourbit(here: Path, capsys: pytest.CaptureFixture[str]) -> Fourbit:
    """fourbit("train", ...) gives exit code, standard output and standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        code = main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
