"""Two processes learn what one does, with the whole base in each and with shares of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fourbit.errors import ConfigError
from fourbit.processes import ALONE, Processes
from fourbit.training import run
from fourbit.training.planner import Planner
from fourbit.training.shards import shares_bytes
from fourbit.training.target import Rows, Target
from tests.model.test_architectures import save
from tests.tiny import byte_tokenizer, llama, save_llama
from tests.training.processes_worker import config_of

ROOT = Path(__file__).parents[2]
sharing = pytest.mark.skipif(not shares_bytes(), reason="torch 2.11's FSDP takes floats only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, and beside it the run of one."""
    place = tmp_path_factory.mktemp("processes")
    save_llama(place / "model")
    save(place / "mixture", "mixtral", num_local_experts=4)
    with (place / "rows.jsonl").open("w") as file:
        for row in range(30):
            file.write(json.dumps({"text": f"row {row} " + "abc " * (row % 7 + 2)}) + "\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.training.processes_worker", str(place)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run.run(config_of(place, "one"), Console(quiet=True))
    run.run(config_of(place, "one-uneven", micro_batch=3), Console(quiet=True))
    run.run(config_of(place, "mixture", mixture=True), Console(quiet=True))
    return place


def digests(run_folder: Path) -> dict[str, str]:
    newest = max((run_folder / "checkpoints").glob("step-*"))
    files = [
        run_folder / "metrics.jsonl",
        run_folder / "adapter" / "adapter_model.safetensors",
        *sorted(newest.glob("*.safetensors")),
    ]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("other", ["replicated", pytest.param("shared", marks=sharing), "resumed"])
def test_the_same_bytes_as_one_process(folder: Path, other: str) -> None:
    """Two micro-batches a step: each process has one, and two sums are the same in either order."""
    found = digests(folder / "one")
    assert len(found) >= 3
    assert digests(folder / other) == found
    assert not list(folder.glob("**/.lock"))


@sharing
def test_experts_are_shared_out_too(folder: Path) -> None:
    assert digests(folder / "mixture-shared") == digests(folder / "mixture")


def test_an_uneven_share_of_micro_batches(folder: Path) -> None:
    """Three of them: sums are taken in another order, and shares of the base change nothing more."""
    if shares_bytes():
        assert digests(folder / "uneven") == digests(folder / "uneven-shared")

    def steps(name: str) -> list[dict[str, float]]:
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "loss" in line]

    mine, one = steps("uneven"), steps("one-uneven")
    assert mine[0]["loss"] == one[0]["loss"]
    assert mine[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-6)
    # From then on AdamW makes much of a sum's last bit, where a gradient is near zero.
    assert [step["loss"] for step in mine] == pytest.approx([step["loss"] for step in one], rel=1e-2)


def test_memory_that_runs_out_in_one_process_is_given_up_in_all(folder: Path) -> None:
    """The step is done again with smaller micro-batches, by both."""
    newest = max((folder / "short" / "checkpoints").glob("step-*"))
    state = json.loads((newest / "state.json").read_text())
    assert state["relief"] == {"micro_batch": 2}
    assert state["progress"]["step"] == 6


@sharing
def test_each_holds_half_of_the_base(folder: Path) -> None:
    for rank in range(2):
        before, after = json.loads((folder / f"bytes-{rank}.json").read_text())
        assert after == pytest.approx(before / 2, rel=0.02)


def test_who_computes_what() -> None:
    items = ["a", "b", "c"]
    assert list(ALONE.turns(items)) == [(0, "a", True), (1, "b", True), (2, "c", True)]
    assert list(Processes(1, 2).turns(items)) == [(1, "b", True)]
    assert list(Processes(1, 2, together=True).turns(items)) == [(1, "b", True), (3, "c", False)]
    assert list(Processes(3, 4, together=True).turns(items)) == [(3, "c", False)]
    assert list(Processes(1, 2, together=True).turns([])) == []
    assert ALONE.any(True)
    assert not ALONE.any(False)


def test_what_cannot_be_shared_out_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, "refused", shard_weights=True)
    monkeypatch.setattr("fourbit.training.shards.shares_bytes", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.shard_weights needs torch 2\.12 or newer, this is"):
        run.run(config, Console(quiet=True))
    monkeypatch.setattr("fourbit.training.shards.shares_bytes", lambda: True)
    with pytest.raises(ConfigError, match="there are none under lora: none"):
        run.run(config.model_copy(update={"lora": None}), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"attach an adapter with fourbit\.add_lora"):
        run.fit(llama(), byte_tokenizer(), config, Console(quiet=True))
    on_disk = config.model.model_copy(update={"weight_tier": "disk"})
    with pytest.raises(ConfigError, match=r"set model\.weight_tier to device"):
        run.run(config.model_copy(update={"model": on_disk}), Console(quiet=True))


def test_a_plan_counts_one_share(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, "planned", shard_weights=True)
    monkeypatch.setattr("fourbit.training.planner.join", lambda: Processes(0, 4))
    planner = Planner(config, Target.of(config, "cpu"), Rows(32), runtime=1000)
    held = {part.name: part.size for part in planner.plan(planner.asked).held}
    every = planner.weights.codes + planner.weights.scales
    assert held["packed weights"] == pytest.approx(every / 4 + 2 * every / 2, abs=4)  # it has two layers
