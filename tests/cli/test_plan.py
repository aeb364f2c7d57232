"""`fourbit plan`, and what `fourbit train` does with a budget."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from fourbit.memory import measure
from fourbit.memory.cards import Card
from fourbit.training import budget
from tests.cli.conftest import Fourbit

pytestmark = pytest.mark.planned

LLAMA_7B = str(Path(__file__).parent.parent / "memory" / "shapes" / "llama-7b")
TRAIN = ("train", "--model", "model", "--data", "rows.jsonl", "--output", "run", "--set", "train.max_steps=1",
         "--set", "model.compute_dtype=float32", "--set", "data.max_length=64",
         "--set", "train.effective_batch=4")  # fmt: skip


def test_the_table_fits_a_terminal_and_json_has_all(
    fourbit: Fourbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = ("plan", "--model", LLAMA_7B, "--device", "rtx-4090", "--set", "lora.r=64", "--memory", "12GB")
    code, out, _ = fourbit(*words)
    assert code == 0
    assert "parameters: 6,738,415,616, trained: 159,907,840" in out
    table = out[out.index("runtime ") : out.index("peak of other")]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "fits in 12.00 GB" in out
    assert "refused: micro_batch 16, no checkpointing" in out
    code, out, _ = fourbit(*words, "--json")
    plan = json.loads(out)
    assert (code, plan["fits"], plan["budget"]) == (0, True, 12 * 10**9)
    held = sum(part["size"] for part in plan["held"])
    assert plan["peak"] == held + max(phase["size"] for phase in plan["phases"])


def test_time_is_this_machines(fourbit: Fourbit) -> None:
    words = ("plan", "--model", "model", "--time", "--set", "data.max_length=16")
    code, out, _ = fourbit(*words)
    assert code == 0
    assert re.search(r"\na step takes about \S+ s here, 1,000 such rows \d+\.\d minutes\n", out)
    assert json.loads(fourbit(*words, "--json")[1])["step_seconds"] > 0
    assert json.loads(fourbit(*words[:3], "--json")[1])["step_seconds"] is None
    code, _, error = fourbit(*words, "--device", "a6000")
    assert code == 2
    assert "--time times this machine's CPU, and this plan is for " in error


def test_a_device_that_is_none_is_no_card(fourbit: Fourbit) -> None:
    """`plan --device` takes cards that need not be here, settings do not."""
    code, _, error = fourbit(*TRAIN, "--set", "model.device=rtx-4090")
    message = "model.device = 'rtx-4090': not a device; use cpu, cuda or auto"
    assert (code, error) == (2, f"fourbit train: error: {message}\n")


def test_what_fits_nowhere_has_an_exit_code(fourbit: Fourbit, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, error = fourbit("plan", "--model", "model", "--device", "a6000", "--memory", "10MB")
    assert (code, out) == (9, "")
    assert error.startswith("fourbit plan: error: 10 MB of memory do not suffice: the least that works here")
    monkeypatch.setattr("fourbit.training.target.find_card", lambda name: Card("small", 100_000_000))
    code, out, _ = fourbit("plan", "--model", "model", "--device", "small")
    assert code == 9
    assert "does not fit in 100 MB" in out
    assert fourbit("plan", "--model", "model", "--memory", "lots")[0] == 2


def test_training_keeps_the_plan_beside_what_it_took(fourbit: Fourbit, here: Path) -> None:
    code, out, _ = fourbit(*TRAIN)
    assert code == 0
    assert " predicted, " in out
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["predicted_peak_bytes"] == summary["plan"]["peak"] > 500_000_000
    assert summary["plan"]["budget"] is None
    assert summary["plan"]["trainable"] == summary["trainable_parameters"]


def test_training_follows_the_plan(fourbit: Fourbit, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("fourbit.training.run.compact_heap", lambda: called.append(1))
    code, _, error = fourbit(*TRAIN, "--memory", "501MB", "--dry-run")
    assert code == 9, error
    assert not (here / "run").exists()
    code, _, _ = fourbit(*TRAIN, "--memory", "600MB")
    assert code == 0
    settings = yaml.safe_load((here / "run" / "config.yaml").read_text())
    settings = {**settings["model"], **settings["train"]}
    chosen = json.loads((here / "run" / "summary.json").read_text())["plan"]["choice"]
    assert chosen == {key: settings[key] for key in chosen}
    assert chosen["micro_batch"] == 4
    assert not chosen["activation_checkpointing"]
    assert called == [1]


def test_a_run_beyond_the_machine_is_refused_before_it_starts(
    fourbit: Fourbit, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "memory_limit", lambda: (400_000_000, "the limit of a group"))
    code, _, error = fourbit(*TRAIN)
    assert code == 9
    assert "400 MB of memory do not suffice" in error
    code, _, error = fourbit(*TRAIN, "--memory", "1GB")
    assert code == 9
    assert "the limit of a group is 400 MB" in error
    assert not (here / "run").exists()


def test_a_compact_heap_gives_memory_back(tmp_path: Path) -> None:
    """Blocks between 256 KiB and the heap's own threshold leave the resident set when they are freed."""
    import subprocess
    import sys

    code = (
        "import torch; from fourbit.memory.measure import compact_heap, resident_bytes\n"
        "compact_heap()\n"
        "kept = []\n"
        "for _ in range(200): kept += [torch.ones(75_000), torch.ones(2_000)]\n"
        "full = resident_bytes(); kept = kept[1::2]; print(full - resident_bytes())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 0.9 * 200 * 300_000
    assert measure.resident_bytes() <= measure.peak_resident_bytes()
