"""What a benchmark's figures depend on: the machine and the versions."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fourbit
from fourbit.kernels import native


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "instruction_set": native.isa() if native.available() else "none: the reference ran",
        **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "fourbit": fourbit.__version__,
        "python": platform.python_version(),
    }
