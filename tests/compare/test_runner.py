"""One process at a time, what ends badly does not stop the rest, what has finished is not run again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fourbit.compare.arm import Outcome, outcome_of, read_outcome
from fourbit.compare.runner import Job, check, run_all
from fourbit.errors import ConfigError, ModelError, TrainingError
from tests.compare.conftest import Make

Calls = Callable[[], list[str]]


def ignore(*_: object) -> None:
    pass


def test_seeds_outside_arms_inside(jobs: Make, command: list[str], calls: Calls) -> None:
    told: list[tuple[int, int, str, str | None]] = []

    def report(number: int, count: int, job: Job, outcome: Outcome | None) -> None:
        told.append((number, count, f"{job.arm.name} {job.seed}", outcome.status if outcome else None))

    outcomes = run_all(jobs("better", "worse"), command, report)
    order = ["better 0", "worse 0", "better 1", "worse 1"]
    assert calls() == order
    assert [outcome.heldout_loss for outcome in outcomes] == pytest.approx([1.0, 1.1, 1.002, 1.103])
    assert told[:4] == [
        (1, 4, order[0], None),
        (1, 4, order[0], "finished"),
        (2, 4, order[1], None),
        (2, 4, order[1], "finished"),
    ]


def test_what_does_not_fit_is_not_tried_with_other_seeds_and_stops_nothing(
    jobs: Make, command: list[str], calls: Calls
) -> None:
    outcomes = run_all(jobs("killed", "broken", "better"), command, ignore)
    assert calls() == ["killed 0", "broken 0", "better 0", "broken 1", "better 1"]
    assert [outcome.status for outcome in outcomes] == ["no memory", "failed", "finished"] * 2
    assert outcomes[0].reason == "the system killed the process, as it does when memory runs out"
    assert outcomes[1].reason == "the process ended with exit code 7 and left no result"


def test_scoring_that_does_not_fit_beside_what_training_left_is_done_anew(
    jobs: Make, command: list[str], calls: Calls
) -> None:
    (outcome,) = run_all(jobs("full", seeds=(0,)), command, ignore)
    assert calls() == ["full 0", "full 0"]
    assert outcome.status == "finished"


def test_the_same_again_runs_only_what_is_missing(jobs: Make, command: list[str], calls: Calls) -> None:
    first = run_all(jobs("better", "broken", seeds=(0,)), command, ignore)
    again = run_all(jobs("better", "broken", "worse", seeds=(0, 1)), command, ignore)
    assert calls() == ["better 0", "broken 0", "broken 0", "worse 0", "better 1", "broken 1", "worse 1"]
    assert again[0] == first[0]


def test_other_settings_in_the_same_folder_are_refused(jobs: Make, command: list[str]) -> None:
    run_all(jobs("better", seeds=(0,)), command, ignore)
    check(jobs("better", "worse"))
    with pytest.raises(ConfigError, match=r"better/seed-0: holds a run with another train\.epochs; name"):
        check(jobs("better", epochs=2.0))


def test_the_folder_may_be_named_otherwise(
    jobs: Make, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = jobs("better", seeds=(0,))
    run_all([job], command, ignore)
    monkeypatch.chdir(tmp_path)
    relative = {"output": "out/better/seed-0", "data": job.config.data.model_copy(update={"train": ("x",)})}
    check([replace(job, config=job.config.model_copy(update=relative))])


def test_ctrl_c_is_passed_on_once_and_waits(jobs: Make, command: list[str], calls: Calls) -> None:
    made = jobs("interrupted", "better", seeds=(0,))
    with pytest.raises(KeyboardInterrupt):
        run_all(made, command, ignore)
    assert calls() == ["interrupted 0"]
    assert read_outcome(made[0].folder) == Outcome("interrupted", "saved")


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from fourbit.compare.arm import end_with_parent\n"
        "end_with_parent(); print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.close()
    assert process.wait(20) == 1
    process.stdout.close()


def test_what_exceptions_mean() -> None:
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(2**60, dtype=torch.uint8)
    assert outcome_of(torch_error.value).status == "no memory"
    assert outcome_of(MemoryError()) == Outcome("no memory", "MemoryError: MemoryError")
    assert outcome_of(OSError(12, "Cannot allocate memory")).status == "no memory"
    wrapped = ModelError("model: cannot be read")
    wrapped.__cause__ = MemoryError("no room")
    assert outcome_of(wrapped) == Outcome("no memory", "MemoryError: no room")
    assert outcome_of(TrainingError("step 3: loss is not finite")) == Outcome(
        "failed", "step 3: loss is not finite"
    )
    assert outcome_of(KeyError("x")) == Outcome("failed", "KeyError: 'x'")
