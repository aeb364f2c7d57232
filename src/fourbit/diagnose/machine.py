"""The machine: cores, memory and its limits, graphics cards, Python. Nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from fourbit.diagnose.finding import Fact, Finding, Problem
from fourbit.memory.limits import cgroup_limit, physical_memory

_OLDEST_PYTHON = (3, 10)
_SECONDS_FOR_NVIDIA_SMI = 10


def check_cores() -> Finding:
    """Cores that this process may use, of those the machine has."""
    present = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    of = "" if usable == present else f" of {present}"
    return Finding((Fact("cores", f"{usable}{of}, {_processor()}", usable),))


def check_memory() -> Finding:
    """Installed memory, what is free of it, and the limit of the control group, if there is one."""
    total, free = physical_memory()
    limit = cgroup_limit()
    text = f"{total / 1e9:.1f} GB" + (f", {free / 1e9:.1f} GB free" if free is not None else "")
    facts = [Fact("memory", text, {"total": total, "free": free})]
    if limit is not None and limit < total:
        facts.append(Fact("memory limit", f"{limit / 1e9:.1f} GB (control group of this process)", limit))
    return Finding(tuple(facts))


def check_cards() -> Finding:
    """NVIDIA cards that the driver knows, whatever torch can do with them."""
    cards = nvidia_cards()
    return Finding((Fact("NVIDIA cards", ", ".join(cards) or "none seen", cards),))


def check_python() -> Finding:
    """The running Python."""
    version = platform.python_version()
    text = f"{version} ({platform.system()} {platform.machine()}, {sys.executable})"
    fact = Fact("Python", text, version)
    if sys.version_info[:2] >= _OLDEST_PYTHON:
        return Finding((fact,))
    wanted = ".".join(map(str, _OLDEST_PYTHON))
    return Finding(
        (fact,), (Problem(f"Python {version} is too old", f"install fourbit under {wanted} or newer"),)
    )


def nvidia_cards() -> list[str]:
    """Names of the NVIDIA cards that the driver lists; under WSL, a line if the driver is passed through."""
    from_driver = _driver_cards(Path("/proc/driver/nvidia/gpus"))
    if from_driver:
        return from_driver
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if tool is not None:
        return _listed_cards(tool)
    through_wsl = Path("/dev/dxg").exists() and any(Path("/usr/lib/wsl/lib").glob("libcuda.so*"))
    return ["card of the Windows host (WSL)"] if through_wsl else []


def _driver_cards(folder: Path) -> list[str]:
    names = []
    for information in sorted(folder.glob("*/information")):
        model = [line for line in information.read_text().splitlines() if line.startswith("Model:")]
        names.append(model[0].partition(":")[2].strip() if model else "unnamed card")
    return names


def _listed_cards(tool: str) -> list[str]:
    try:
        listing = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_SECONDS_FOR_NVIDIA_SMI,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # no driver, or no card behind it
        return []
    return [line.strip() for line in listing.stdout.splitlines() if line.strip()]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
