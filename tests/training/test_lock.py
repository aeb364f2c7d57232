from __future__ import annotations

import io
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fourbit.errors import ConfigError
from fourbit.training import run as training
from fourbit.training.lock import check_free, hold
from tests.training.runner import Runner


def test_two_processes_cannot_write_one_folder(runner: Runner, settings: Any) -> None:
    config = settings(train__max_steps=1000, train__eval_every=1000)
    pid = runner.start(config)
    until = time.monotonic() + 60
    while not (Path(config.output) / "metrics.jsonl").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=rf"run: process {pid} is writing this run; wait for it, stop it"):
        training.run(config, Console(file=io.StringIO()), overwrite=True)
    assert runner.wait(pid, after=0).status == -9
    check_free(Path(config.output))  # the lock went with its process
    short = settings(train__max_steps=2)
    assert training.run(short, Console(file=io.StringIO()), overwrite=True).stopped == "done"


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with hold(folder):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} is writing this run"), hold(folder):
            pass
        with pytest.raises(ConfigError, match="is writing this run"):
            check_free(folder)
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]
    check_free(folder)
    with hold(folder):
        pass


def test_a_folder_that_stayed_empty_goes(tmp_path: Path) -> None:
    with hold(tmp_path / "runs" / "one"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time_however_often_the_lock_changes_hands(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    inside, most, entered = 0, 0, 0

    def contend() -> None:
        nonlocal inside, most, entered
        for _ in range(300):
            try:
                with hold(folder):
                    inside += 1
                    most = max(most, inside)
                    entered += 1
                    time.sleep(0.0001)
                    inside -= 1
            except ConfigError:
                time.sleep(0.0001)

    mask = os.umask(0o077)  # of the process: threads that set and restore it would mix up theirs
    try:
        threads = [threading.Thread(target=contend) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.umask(mask)
    assert most == 1
    assert entered > 100


def test_what_a_run_writes_is_its_owners_alone(settings: Any) -> None:
    mask = os.umask(0o022)
    try:
        config = settings(train__tensorboard=True)
        training.run(config, Console(file=io.StringIO()))
    finally:
        assert os.umask(mask) == 0o022  # as it was before the run
    written = [Path(config.output), *Path(config.output).rglob("*")]
    assert len(written) > 15
    assert [path for path in written if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="run: cannot be made"), hold(tmp_path / "file" / "run"):
        pass
