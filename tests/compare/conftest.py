"""Arms whose processes are a few lines of Python instead of a training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fourbit.compare.arm import Outcome
from fourbit.compare.arms import Arm
from fourbit.compare.runner import Job
from fourbit.config import RunConfig
from fourbit.config_file import load_config

Make = Callable[..., list[Job]]

#: Counts its calls in the comparison's folder, then does what its arm is named for.
FAKE = """
import json, os, signal, sys
from dataclasses import asdict
from pathlib import Path
from fourbit.compare.arm import Outcome, write_outcome

folder = Path(sys.argv[1])
arm, seed = folder.parent.name, int(folder.name.removeprefix("seed-"))
with (folder.parent.parent / "calls").open("a") as calls:
    calls.write(f"{arm} {seed}\\n")
if arm == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if arm == "full":
    trained = (folder / "summary.json").exists()
    (folder / "summary.json").write_text("{}")
    if not trained:
        os.kill(os.getpid(), signal.SIGKILL)
if arm == "broken":
    os._exit(7)
if arm == "interrupted":
    os.kill(os.getppid(), signal.SIGINT)
    try:
        signal.pause()
    except KeyboardInterrupt:
        write_outcome(folder, Outcome("interrupted", "saved"))
        sys.exit(1)
losses = {"better": 1.0, "worse": 1.1, "full": 1.0}
right = [row < (8 if arm == "better" else 2) for row in range(10)]
noise = 0.001 * seed * (2 if arm == "better" else 3)
loss = losses[arm] + noise
write_outcome(folder, Outcome("finished", "", loss, 10, 10, 1000, right, 10**9, 20.0, 2.0, 5, 50))
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return [sys.executable, str(path)]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(None, [f"model.path={tmp_path}/model", f"data.train={tmp_path}/rows.jsonl"])


@pytest.fixture
def jobs(tmp_path: Path, config: RunConfig) -> Make:
    """jobs("better", "killed", seeds=(0, 1)) gives one job for each seed and arm."""

    def make(*names: str, seeds: Sequence[int] = (0, 1), **changes: object) -> list[Job]:
        return [
            Job(
                Arm(name, ()),
                seed,
                config.model_copy(
                    update={
                        "output": str(tmp_path / "out" / name / f"seed-{seed}"),
                        "train": config.train.model_copy(update={"seed": seed, **changes}),
                    }
                ),
                (),
                "0",
            )
            for seed in seeds
            for name in names
        ]

    return make


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[str]]:
    """Which processes ran, in order."""

    def read() -> list[str]:
        path = tmp_path / "out" / "calls"
        return path.read_text().splitlines() if path.exists() else []

    return read


def finished(loss: float, right: list[bool] | None = None, **figures: int) -> Outcome:
    """An outcome of an arm that went well."""
    values = {"best_step": 10, "steps": 10, "tokens": 1000, "peak_bytes": 10**9, "parameters": 50, **figures}
    return Outcome(
        "finished",
        heldout_loss=loss,
        right=right,
        seconds=20.0,
        trainable_parameters=5,
        **values,
    )


def write_rows(path: Path, count: int) -> Path:
    rows = [{"prompt": f"color {n}?", "completion": "red"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
