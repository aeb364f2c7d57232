from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.conftest import DEVICE

ROOT = Path(__file__).parents[2]


#: What `benchmarks/gpu.py` does without, though fourbit needs it.
NOT_NEEDED = ("pydantic", "rich", "datasets", "gguf", "numba")
PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(","), None))
sys.path.insert(0, sys.argv.pop(1))
import gpu
sys.exit(gpu.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("absent", [(), NOT_NEEDED], ids=["all", "little"])
def test_every_part_runs_on_the_smallest_shapes(absent: tuple[str, ...]) -> None:
    """What a card will be asked is tried without one, where Triton is interpreted."""
    interpreted = {"TRITON_INTERPRET": "1"} if DEVICE.type == "cpu" else {}
    missing, folder = ",".join(absent) or "none", str(ROOT / "benchmarks")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, missing, folder, "--tiny", "--json"],
        env={**os.environ, **interpreted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["part"] for row in rows} == {"check", "kernels", "steps", "memory"}
    assert not [row for row in rows if "failed" in row or row.get("equal") is False]
    capped = [row for row in rows if row["part"] == "memory" and "step_s" in row]
    assert len(capped) == 2
    assert all(("predicted_gb" in row) is not bool(absent) for row in capped)
