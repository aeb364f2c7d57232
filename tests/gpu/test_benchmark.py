from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.conftest import DEVICE

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_runs_on_the_smallest_shapes() -> None:
    """What a card will be asked is tried without one, where Triton is interpreted."""
    interpreted = {"TRITON_INTERPRET": "1"} if DEVICE.type == "cpu" else {}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--json"],
        env={**os.environ, **interpreted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["part"] for row in rows} == {"check", "kernels", "steps", "memory"}
    assert not [row for row in rows if "failed" in row or row.get("equal") is False]
