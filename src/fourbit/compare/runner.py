"""All arms with all seeds, one process at a time; what has finished before is not run again."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.compare.arm import OUTCOME, SPEC, Outcome, read_outcome, write_outcome
from fourbit.compare.arms import Arm
from fourbit.config import RunConfig
from fourbit.errors import ConfigError

#: The exit statuses of a process that the system has killed, which it does when memory runs out.
_KILLED = (-9, 137)


@dataclass(frozen=True, slots=True)
class Job:
    """One arm with one seed: its settings (output is its folder) and the files to score on."""

    arm: Arm
    seed: int
    config: RunConfig
    score: tuple[str, ...]
    rows_sha256: str

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def spec(self) -> dict[str, Any]:
        """What determines the result, as its process reads it."""
        config = self.config.model_dump(mode="json")
        if config["lora"] is None:
            config["lora"] = "none"
        return {"config": config, "score": list(self.score), "rows": self.rows_sha256}


#: Told what goes on: (number of the job, of how many, job, what it came to; None as it starts).
Report = Callable[[int, int, Job, Outcome | None], None]


def check(jobs: Sequence[Job]) -> None:
    """Raises ConfigError when a folder holds a run with other settings."""
    for job in jobs:
        path = job.folder / SPEC
        if not path.exists():
            continue
        changed = _difference(
            _without_places(json.loads(path.read_text("utf-8"))), _without_places(job.spec())
        )
        if changed is not None:
            raise ConfigError(
                f"{job.folder}: holds a run with another {changed}; name another --output, or remove it"
            )


def run_all(jobs: Sequence[Job], command: Sequence[str], report: Report) -> list[Outcome]:
    """The outcome of each job, in order. `command` and a run folder start a process that calls `run_arm`.

    After an arm did not fit with one seed, its other seeds are not tried. Raises KeyboardInterrupt once the
    running process has saved what it has.
    """
    outcomes: list[Outcome] = []
    too_large: dict[str, Outcome] = {}
    for number, job in enumerate(jobs, start=1):
        outcome = read_outcome(job.folder)
        if outcome is None or outcome.status != "finished":
            outcome = too_large.get(job.arm.name)
            if outcome is None:
                report(number, len(jobs), job, None)
                outcome = _run(job, command)
                if outcome.status == "no memory" and (job.folder / "summary.json").exists():
                    # Trained, and then too full to score: a fresh process has only that to do.
                    outcome = _run(job, command)
        if outcome.status == "no memory":
            too_large[job.arm.name] = outcome
        report(number, len(jobs), job, outcome)
        outcomes.append(outcome)
    return outcomes


def _run(job: Job, command: Sequence[str]) -> Outcome:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / OUTCOME).unlink(missing_ok=True)
    (job.folder / SPEC).write_text(json.dumps(job.spec(), indent=2) + "\n", encoding="utf-8")
    # A session of its own: Ctrl-C reaches it once, passed on below, and not a second time by the terminal.
    # It ends with this process, when its standard input closes (end_with_parent).
    process = subprocess.Popen(
        [*command, str(job.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        if process.stdin is not None:
            process.stdin.close()
    outcome = read_outcome(job.folder)
    if outcome is None:
        outcome = _ended_without_word(code)
        write_outcome(job.folder, outcome)
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    return outcome


def _ended_without_word(code: int) -> Outcome:
    if code in _KILLED:
        return Outcome("no memory", "the system killed the process, as it does when memory runs out")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Outcome("failed", f"the process ended with {how} and left no result")


def _without_places(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec without the comparison's own paths, which change when it is moved; rows are hashed."""
    config = {key: value for key, value in spec["config"].items() if key != "output"}
    config["data"] = {key: value for key, value in config["data"].items() if key not in ("train", "heldout")}
    return {**spec, "config": config, "score": bool(spec["score"])}


def _difference(stored: Any, wanted: Any, path: str = "") -> str | None:
    """The dotted name of the first value in which two trees differ."""
    if not isinstance(stored, dict) or not isinstance(wanted, dict):
        return None if stored == wanted else path
    for key in (*wanted, *stored):
        found = _difference(stored.get(key), wanted.get(key), f"{path}.{key}".lstrip("."))
        if found is not None:
            return found.removeprefix("config.")
    return None
