"""Finding, checking and choosing: what happens when the library is not as it should be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourbit.errors import ConfigError
from fourbit.kernels import native

NEEDS_LIBRARY = pytest.mark.skipif(not native.available(), reason=f"native library: {native.load_error()}")


def interpreter(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def last_line(code: str, **environment: str) -> str:
    """What a fresh interpreter says last."""
    run = interpreter(code, **environment)
    return (run.stdout + run.stderr).strip().splitlines()[-1]


REPORT = "from fourbit.kernels import native; print(native.available(), native.load_error())"


def test_no_library(tmp_path: Path) -> None:
    report = last_line(REPORT, FOURBIT_NATIVE=str(tmp_path))
    assert report == f"False no fourbit_native library in {tmp_path}; build it with `pip install .` or cmake"


def test_without_a_library_everything_works_and_one_notice_says_so(tmp_path: Path) -> None:
    code = (
        "import torch; from fourbit import functional as F4; w = torch.randn(64, 64); "
        "q = F4.quantize_4bit(w); F4.dequantize_4bit(q); print(F4.linear_4bit(w[:1], q).shape)"
    )
    run = interpreter(code, FOURBIT_NATIVE=str(tmp_path), PYTHONWARNINGS="error")
    assert run.stdout.strip() == "torch.Size([1, 64])"
    assert run.stderr.count("the native library is not used") == len(run.stderr.splitlines()) == 1


def test_a_file_that_is_not_a_library(tmp_path: Path) -> None:
    library = tmp_path / "fourbit_native.so"
    library.write_bytes(b"not a library")
    report = last_line(REPORT, FOURBIT_NATIVE=str(tmp_path))
    assert report.startswith(f"False {library} cannot be used: ")


@NEEDS_LIBRARY
def test_a_library_of_another_version_is_refused() -> None:
    report = last_line("from fourbit.kernels import native; native._ABI += 1; " + REPORT.partition("; ")[2])
    assert report.startswith("False ")
    assert report.endswith(
        f"has interface {native._ABI} and this fourbit needs {native._ABI + 1}; build it again"
    )


@NEEDS_LIBRARY
def test_nothing_is_loaded_by_importing() -> None:
    code = "from fourbit.kernels import native; print('fourbit_native' in open('/proc/self/maps').read())"
    if Path("/proc/self/maps").exists():
        assert last_line(code) == "False"


@NEEDS_LIBRARY
def test_an_unknown_instruction_set_is_refused() -> None:
    before = native.isa()
    with pytest.raises(
        ConfigError, match=r"^set_isa: instruction set 'sse9' is not available here; use one of "
    ):
        native.set_isa("sse9")
    assert native.isa() == before


@NEEDS_LIBRARY
def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from fourbit.kernels import native; print(native.isa())"
    assert last_line(code, FOURBIT_ISA="scalar") == "scalar"
    assert "FOURBIT_ISA: instruction set 'best' is not available" in last_line(code, FOURBIT_ISA="best")


@NEEDS_LIBRARY
def test_one_openmp_runtime_serves_torch_and_the_library() -> None:
    if not Path("/proc/self/maps").exists():
        assert native.openmp_runtimes() == []
        return
    code = (
        "import torch; torch.randn(10**6).sum(); from fourbit.kernels import native; "
        "before = native.openmp_runtimes(); native.isa(); "
        "print(native.openmp_runtimes() == before, len(before))"
    )
    assert last_line(code) == "True 1"
