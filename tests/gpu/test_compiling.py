"""Triton's compiler takes every kernel, for cards that are not here; its interpreter would take more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Shared memory that a program may have: compute capability 7.5, and the smallest of 8.0 and newer.
SHARED = {75: 64 << 10, 80: 99 << 10, 90: 99 << 10}


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        pytest.param(75, "fp16", marks=pytest.mark.slow),
        (80, "bf16"),
        pytest.param(80, "fp16", marks=pytest.mark.slow),
        pytest.param(80, "fp32", marks=pytest.mark.slow),
        pytest.param(90, "bf16", marks=pytest.mark.slow),
    ],
)
def test_all_kernels(capability: int, dtype: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compiling", str(capability), dtype],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, counts in found.items():
        assert counts["shared"] <= SHARED[capability], name
        # Bytes count in all but the loss and the products.
        if name not in ("loss", "row", "rows", "many"):
            assert (counts["fused"], counts["approximate"]) == (0, 0), name
    for name in found.keys() & {"rows", "many"}:
        assert (found[name]["tensor_cores"] > 0) == (capability >= 80 and dtype != "fp32")
