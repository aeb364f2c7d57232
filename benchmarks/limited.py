"""`fourbit` in a process of its own, under a limit that a control group enforces, where one can be made."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))


@dataclass(frozen=True)
class Limited:
    """enforced: by a control group (Linux, as root); peak: bytes it counted, its file cache included."""

    enforced: bool
    peak: int | None


def run_limited(limit: int, command: list[str]) -> Limited:
    """Run a command of fourbit; ends this process where that one fails, as it does with a byte too many."""
    group = control_group(limit)
    say(
        f"control group {group}" if group else "no control group can be made here: nothing enforces the limit"
    )

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        code = subprocess.run(
            [sys.executable, "-m", "fourbit", *command], preexec_fn=enter, check=False, stdout=sys.stderr
        ).returncode
        highest = group_peak(group)
    finally:
        if group is not None:
            with suppress(OSError):
                group.rmdir()
    if code:
        raise SystemExit(f"fourbit {command[0]} ended with code {code}")
    return Limited(group is not None, highest)


def control_group(limit: int) -> Path | None:
    """A new control group with this limit, or None where none can be made."""
    for root in _GROUPS:
        group = root / f"fourbit-{os.getpid()}"
        file = "memory.limit_in_bytes" if root.name == "memory" else "memory.max"
        with suppress(OSError):
            group.mkdir()
            if (group / file).exists():
                (group / file).write_text(str(limit))
                with suppress(OSError):
                    (group / "memory.swap.max").write_text("0")
                return group
            group.rmdir()
    return None


def group_peak(group: Path | None) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        with suppress(OSError, AttributeError):
            return int((group / name).read_text())  # type: ignore[operator]
    return None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
