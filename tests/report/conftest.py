"""A run folder as training leaves it, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fourbit.config_file import dump_config, load_config
from tests.pages import EVIL, write_lines
from tests.tiny import byte_tokenizer, llama

EVIL_SETTING = '<img src="x">'
EVIL_SETTING = '<img src="x">'
STEPS = 60


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """Of a model whose weights are never read."""
    folder = tmp_path / "model"
    byte_tokenizer().save_pretrained(str(folder))
    llama().config.save_pretrained(str(folder))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path, model_folder: Path) -> Path:
    """60 steps, 6 evaluations; step 3 was not finite. Every text in rows and settings is hostile."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows = tmp_path / "rows.jsonl"
    write_lines(rows, [{"prompt": f"{EVIL} {n}", "completion": "grün & blau"} for n in range(8)])
    overrides = [
        f"model.path={model_folder}",
        f"data.train={rows}",
        f"data.system={json.dumps(EVIL_SETTING)}",
        "data.max_length=512",
    ]
    (folder / "config.yaml").write_text(dump_config(load_config(None, overrides)))
    metrics: list[dict[str, object]] = []
    timing: list[dict[str, object]] = []
    for step in range(1, STEPS + 1):
        loss = math.nan if step == 3 else 1 + math.exp(-step / 40)
        metrics.append(
            {"step": step, "loss": loss, "learning_rate": 2e-4, "grad_norm": 0.4, "tokens": 100 * step}
        )
        timing.append({"step": step, "seconds": 0.5, "tokens_per_second": 200.0, "peak_bytes": 10**9})
        if step % 10 == 0:
            metrics.append({"step": step, "heldout_loss": 1.1 + math.exp(-step / 40)})
            timing.append({"step": step, "heldout_seconds": 2.0})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "timing.jsonl", timing)
    return folder


@pytest.fixture
def evaluated(run_folder: Path) -> Path:
    """The same with an evaluation beside it."""
    sample = {"prompt": EVIL, "reference": "blue", "answer": EVIL, "right": False, "choice": None}
    accuracy = {"value": 0.5, "low": 0.25, "high": 0.75, "right": 2, "count": 4}
    result = {"rows": 4, "accuracy": accuracy, "loss": 1.25, "samples": [sample], "cut_answers": 0}
    (run_folder / "evaluation.json").write_text(json.dumps({"base": result, "adapter": result}))
    return run_folder
