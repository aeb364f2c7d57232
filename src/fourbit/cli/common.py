"""What several commands share: settings from a file and overrides, and output for people or machines."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fourbit.config import RunConfig
from fourbit.config_file import load_config
from fourbit.errors import ConfigError

#: How often progress is printed where there is no terminal to redraw.
PLAIN_EVERY_SECONDS = 15.0

#: Short options of the common path, and the setting each one overrides.
SHORTCUTS = {"model": "model.path", "data": "data.train", "output": "output"}


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG.yaml, --model, --data, --output, --set, --json."""
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="settings; `fourbit init` writes one"
    )
    parser.add_argument("--model", help="base model: a folder, a hub name or a .gguf file")
    parser.add_argument("--data", help="training data: a file or a `datasets` folder")
    parser.add_argument("--output", help="the run folder")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one setting, such as lora.r=32",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, progress on standard error"
    )


def read_settings(args: argparse.Namespace) -> RunConfig:
    """The settings that the arguments of `add_config_arguments` describe."""
    if args.config is None and (args.model is None or args.data is None):
        raise ConfigError("give a config file, or --model and --data")
    shortcuts = [
        f"{key}={json.dumps(getattr(args, name))}" for name, key in SHORTCUTS.items() if getattr(args, name)
    ]
    return load_config(args.config, [*shortcuts, *args.overrides])


def console(json_output: bool = False) -> Console:
    """Where people read: standard output, or standard error when that carries JSON."""
    return Console(stderr=json_output)


def print_json(value: Any) -> None:
    """A result for machines, on standard output."""
    print(json.dumps(value, indent=2, default=str))


def run_settings(folder: str) -> RunConfig:
    """The resolved settings of a run folder. Raises ConfigError when it is not one."""
    path = Path(folder) / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder}: not a run folder (it has no config.yaml)")
    return load_config(path)


@contextmanager
def stage_progress(name: str, out: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields report(stage, done, total): bars in a terminal, a line every quarter of a minute elsewhere.

    A total of 0 stands for one that is not known.
    """
    if not out.is_terminal:
        yield _plain_report(name, out)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{name}: {stage}", total=total or None)
            bar.update(tasks[stage], completed=done)

        yield report


def _plain_report(name: str, out: Console) -> Callable[[str, int, int], None]:
    printed = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= PLAIN_EVERY_SECONDS:
            printed = time.monotonic()
            out.print(f"{name}: {stage} {done:,}" + (f"/{total:,}" if total else ""), highlight=False)

    return report
