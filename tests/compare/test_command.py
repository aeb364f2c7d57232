"""`fourbit compare` as a user runs it: real trainings of a tiny model, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fourbit as package
from fourbit.cli.main import main
from fourbit.compare.arm import read_outcome
from fourbit.memory.measure import peak_resident_bytes
from tests.compare.conftest import write_rows
from tests.pages import Page
from tests.tiny import save_llama

Compare = Callable[..., tuple[int, str, str]]
CONFIG = """
model: {path: model, compute_dtype: float32}
data: {train: rows.jsonl, max_length: 64, heldout_fraction: 0.25}
train: {max_steps: 4, epochs: 100, effective_batch: 4, eval_every: 2, learning_rate: 0.01}
eval: {max_new_tokens: 3}
"""


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Compare:
    """compare("--vary", ...) gives exit code, standard output and standard error."""
    save_llama(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 16)
    (tmp_path / "c.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(package.__file__).parent.parent))

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        code = main(["compare", "c.yaml", "--output", "out", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_lora_and_full_fine_tuning_side_by_side(compare: Compare, tmp_path: Path) -> None:
    words = ("--methods", "lora,full", "--seeds", "3", "--set", "full: train.learning_rate=0.003", "--json")
    code, out, err = compare(*words)
    result = json.loads(out)
    assert code == 0, err
    lora, full = result["arms"]
    assert (lora["status"], full["status"]) == ("finished", "finished")
    assert (lora["learning_rate"], full["learning_rate"]) == (0.01, 0.003)
    assert lora["trainable_parameters"] < full["trainable_parameters"] == full["parameters"]
    assert result["rows"] == {"train": 12, "heldout": 4, "score": 4}
    assert [item["figure"] for item in result["differences"]] == ["held-out loss", "score"]
    assert "arm 1 of 2: lora, seed 3\n" in err
    assert "arm 2 of 2: full, seed 3: held-out loss" in err
    for arm in (lora, full):
        folder = tmp_path / "out" / arm["name"] / "seed-3"
        outcome, summary = read_outcome(folder), json.loads((folder / "summary.json").read_text())
        assert outcome is not None
        assert outcome.heldout_loss == arm["losses"]["3"] == summary["heldout_loss"]
        assert outcome.right is not None
        assert len(outcome.right) == 4
        assert not (folder / "checkpoints").exists()
    assert Page((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")).charts == 5
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()).items() <= result.items()

    # Again: nothing is trained, the result is the same, and people get a table.
    before = (tmp_path / "out/full/seed-3/outcome.json").stat().st_mtime_ns
    code, out, _ = compare(*words[:-1])
    assert code == 0
    assert (tmp_path / "out/full/seed-3/outcome.json").stat().st_mtime_ns == before
    assert "One seed" in out
    assert f"{lora['losses']['3']:.4f}" in out
    code, out, err = compare(*words[:3], "4", "--set", "data.max_rows=3")
    assert (code, out) == (2, "")
    assert "holds other rows" in err


@pytest.mark.slow
def test_an_interrupted_training_goes_on(compare: Compare, tmp_path: Path) -> None:
    """The arm's process itself, interrupted after a checkpoint, then started again by the command."""
    words = ("--vary", "r4: lora.r=4", "--seeds", "0", "--eval-rows", "0")
    words += ("--set", "train.max_steps=80", "--set", "train.eval_every=40")
    assert compare(*words)[0] == 0
    folder = tmp_path / "out" / "r4" / "seed-0"
    whole = (folder / "metrics.jsonl").read_bytes()
    whole_loss = read_outcome(folder)
    for name in ("outcome.json", "summary.json", "metrics.jsonl", "timing.jsonl"):
        (folder / name).unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "fourbit", "compare", "--arm", str(folder)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 40: held-out"):
            break
    while not (folder / "checkpoints" / "step-000040").exists():
        time.sleep(0.001)
    process.stdin.close()  # as if the command had been killed
    assert process.wait(60) == 1
    process.stderr.close()
    assert read_outcome(folder) is None
    assert compare(*words)[0] == 0
    assert (folder / "metrics.jsonl").read_bytes() == whole
    after = read_outcome(folder)
    assert after is not None
    assert whole_loss is not None
    assert (after.heldout_loss, after.right) == (whole_loss.heldout_loss, None)


def test_too_little_memory_and_a_failure_are_told(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit in which not even torch can be mapped; and a model that is not there."""
    limited = tmp_path / "limited"
    limited.write_text(
        f'#!/bin/sh\ncase "$*" in *small*) ulimit -v 500000;; esac\nexec {sys.executable} "$@"\n'
    )
    limited.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(limited))
    code, out, _ = compare(
        "--vary", "small: lora.r=4", "--vary", "gone: model.path=none/none", "--seeds", "0", "--json"
    )
    small, gone = json.loads(out)["arms"]
    assert code == 6
    assert (small["status"], gone["status"]) == ("no memory", "failed")
    assert "failed to map segment" in small["reason"]
    assert "none/none: no such" in gone["reason"]


def test_mistakes_are_one_line(compare: Compare, tmp_path: Path) -> None:
    for words, text in (
        (("--seeds", "0,x"), "give whole numbers separated by commas"),
        (("--seeds", "1,1"), "give different numbers"),
        (("--eval-rows", "-1"), "give 0 or more"),
        (("--methods", "lora", "--vary", "lora.r=4"), "not allowed with argument"),
        (("--vary", "lora.r=0"), "arm 'lora.r=0': c.yaml: 'lora.r' = 0"),
        (("--set", "other: lora.r=4"), "no arm of this name"),
    ):
        code, out, err = compare(*words)
        assert (code, out) == (2, ""), words
        assert text in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out" / "qlora").exists()
    assert main(["compare", "c.yaml"]) == 2


@pytest.mark.slow
def test_peak_memory_is_this_processes_own() -> None:
    """getrusage begins at the peak of the process that started this one."""
    program = "from fourbit.memory.measure import peak_resident_bytes as p; print(p())"
    block = bytearray(2 * peak_resident_bytes())
    block[::4096] = b"1" * len(block[::4096])
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert peak_resident_bytes() > len(block) > int(child.stdout)
