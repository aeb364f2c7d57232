"""A tiny model and a tiny task: learn to answer each of eight questions with its own word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fourbit.config import RunConfig
from fourbit.config_file import load_config
from tests.tiny import save_llama
from tests.training.runner import Runner

WORDS = ("red", "blue", "green", "black", "white", "pink", "gray", "gold")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"color {i}?" + "!" * (i % 3), "completion": WORDS[i % 8]} for i in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(tmp_path: Path, data: Path) -> Any:
    """settings(key=value, ...) gives a RunConfig; dots in keys are written as double underscores."""
    model = save_llama(tmp_path / "model")

    def make(**changes: Any) -> RunConfig:
        base = {
            "model.path": str(model),
            "model.compute_dtype": "float32",
            "data.train": str(data),
            "data.heldout_fraction": "0.25",
            "data.max_length": "64",
            "train.max_steps": "6",
            "train.epochs": "100",
            "train.effective_batch": "8",
            "train.micro_batch": "4",
            "train.learning_rate": "0.01",
            "train.max_grad_norm": "1.0",
            "train.eval_every": "3",
            "output": str(tmp_path / "run"),
        }
        base |= {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(
            None,
            [
                f"{key}={json.dumps(value) if not isinstance(value, str) else value}"
                for key, value in base.items()
            ],
        )

    return make


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Runs in processes of their own, which a test may kill."""
    with Runner(tmp_path_factory.mktemp("runner") / "output.txt") as server:
        yield server
