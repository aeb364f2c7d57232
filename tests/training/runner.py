"""Runs in processes of their own that a test may kill at any moment.

`Runner` starts one server, which imports torch and transformers once and forks a process for each run. The
server computes nothing itself, so its children start their own threads.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.config import RunConfig
from fourbit.config_file import dump_config

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit status (negative: the signal that killed it), what it printed, how long."""

    status: int
    output: str
    seconds: float


class Runner:
    """A context; `start` a run, then `wait` for it, perhaps with a signal after some seconds."""

    def __init__(self, log: Path, **environment: str) -> None:
        self._log = log
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.runner", str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), **environment},
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def start(self, config: RunConfig, resume: bool = False, full_disk_at_save: int | None = None) -> int:
        """The process id of a new run; from its so many-th checkpoint on the disk takes small files only."""
        return self.request(
            "train", config=dump_config(config), resume=resume, full_disk_at_save=full_disk_at_save
        )

    def request(self, action: str, **arguments: Any) -> int:
        """The process id of one that runs a function of this module."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"action": action, "arguments": arguments}) + "\n")
        pid = int(self._read())  # the first one takes as long as the server's imports
        self._began = time.monotonic()
        return pid

    def wait(self, pid: int, number: signal.Signals = signal.SIGKILL, after: float | None = None) -> Ended:
        """Wait for the end; `after` so many seconds from the start, send a signal if it still runs."""
        if after is not None:
            rest = max(0.0, self._began + after - time.monotonic())
            if not select.select([self._server.stdout], [], [], rest)[0]:
                os.kill(pid, number)
        status = int(self._read())
        return Ended(status, self._log.read_text(), time.monotonic() - self._began)

    def run(self, config: RunConfig, resume: bool = False, **arguments: Any) -> Ended:
        """A whole run."""
        return self.wait(self.start(config, resume, **arguments))

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


def train(config: str, resume: bool, full_disk_at_save: int | None) -> int:
    from rich.console import Console

    from fourbit.config_file import resolve
    from fourbit.errors import FourBitError
    from fourbit.training import checkpoint
    from fourbit.training import run as training

    if full_disk_at_save is not None:
        real, calls = checkpoint.save, []

        def save(*arguments: Any) -> Path:
            calls.append(1)
            if len(calls) == full_disk_at_save:
                resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
            return real(*arguments)

        checkpoint.save = save  # type: ignore[assignment]
    import yaml

    try:
        result = training.run(resolve(yaml.safe_load(config)), Console(width=500), resume=resume)
    except FourBitError as error:
        print(f"error: {error}")
        return error.exit_code
    return 130 if result.stopped == "interrupted" else 0


def killed_saves(folder: str) -> int:
    """Save over and over in a copy of a run folder, killed at its first, second, ... file operation.

    Leaves folder-1, folder-2, ... as the kills left them, the last one after an undisturbed save.
    """
    import shutil

    import torch

    torch.set_num_threads(1)  # the children below would wait for threads that they do not have
    made = make_run(step=2)
    count = 0
    while True:
        count += 1
        copy = f"{folder}-{count}"
        shutil.copytree(folder, copy)
        pid = os.fork()
        if pid == 0:
            _kill_at_file_operation(count)
            write_run(Path(copy), *made)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            return 0


def make_run(step: int) -> tuple[Any, Any, Any]:
    """Model, optimizer and state of a run whose tensors all hold the step's number."""
    import torch

    from fourbit.model.adapters import add_lora
    from fourbit.optim import PagedAdamW
    from fourbit.training import checkpoint
    from tests.tiny import llama

    model = add_lora(llama(layers=1), r=2, target_modules=["q_proj"])  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW(trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.fill_(step)
    optimizer.write_states(lambda p, name: torch.tensor(step) if name == "step" else p.detach().clone())
    return model, optimizer, checkpoint.State(checkpoint.Progress(step), {"bad": 0, "losses": []}, 0, {}, {})


def write_run(folder: Path, model: Any, optimizer: Any, state: Any) -> None:
    """The best adapter and the only checkpoint of a run."""
    from fourbit.training import checkpoint

    checkpoint.save_best(folder, model)
    checkpoint.save(folder, model, optimizer, state, keep=1)


def _kill_at_file_operation(at: int) -> None:
    operations = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in operations:
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _serve(log: Path) -> None:
    import fourbit.training.run  # noqa: F401  # what every child would import

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = 1
            try:
                status = {"train": train, "killed_saves": killed_saves}[request["action"]](
                    **request["arguments"]
                )
            finally:
                sys.stdout.flush()
                if status == 1:
                    import traceback

                    traceback.print_exc()
                os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
