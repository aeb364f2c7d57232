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


def load_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why no library is found in a folder, asked anew."""
    monkeypatch.setenv("FOURBIT_NATIVE", str(folder))
    library, reason = native._load.__wrapped__()
    assert library is None
    return reason


def test_without_a_library_everything_works_and_one_notice_says_so(tmp_path: Path) -> None:
    run = interpreter(
        "import torch; from fourbit import functional as F4; from fourbit.kernels import native; "
        "w = torch.randn(64, 64); q = F4.quantize_4bit(w); F4.dequantize_4bit(q); "
        "print(F4.linear_4bit(w[:1], q).shape, native.available())",
        FOURBIT_NATIVE=str(tmp_path),
        PYTHONWARNINGS="error",
    )
    assert run.stdout == "torch.Size([1, 64]) False\n"
    reason = f"no fourbit_native library in {tmp_path}; build it with `pip install .` or cmake"
    assert run.stderr.splitlines() == [
        "the native library is not used, the reference runs instead, slower and with the same results: "
        + reason
    ]


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = f"no fourbit_native library in {tmp_path}; build it with `pip install .` or cmake"
    assert load_error(tmp_path, monkeypatch) == expected
    assert load_error(tmp_path / "missing", monkeypatch).startswith("no fourbit_native library in ")


def test_a_file_that_is_not_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "fourbit_native.so"
    library.write_bytes(b"not a library")
    assert load_error(tmp_path, monkeypatch).startswith(f"{library} cannot be used: ")


@NEEDS_LIBRARY
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ABI", native._ABI + 1)
    library, reason = native._load.__wrapped__()
    assert library is None
    assert reason.endswith(
        f" has interface {native._ABI - 1} and this fourbit needs {native._ABI}; build it again"
    )


@NEEDS_LIBRARY
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.isa()
    known = ", ".join(native.isas())
    with pytest.raises(ConfigError) as error:
        native.set_isa("sse9")
    assert str(error.value) == f"set_isa: instruction set 'sse9' is not available here; use one of {known}"
    monkeypatch.setenv("FOURBIT_ISA", "best")
    with pytest.raises(ConfigError, match=r"^FOURBIT_ISA: instruction set 'best' is not available here"):
        native.library.__wrapped__()
    assert native.isa() == before


@NEEDS_LIBRARY
def test_a_fresh_process_loads_late_shares_openmp_and_heeds_the_environment() -> None:
    if not Path("/proc/self/maps").exists():
        assert native.openmp_runtimes() == []
        return
    run = interpreter(
        "import torch; torch.randn(10**6).sum(); from fourbit.kernels import native; "
        "before = native.openmp_runtimes(); print('fourbit_native' in open('/proc/self/maps').read()); "
        "print(native.isa(), native.openmp_runtimes() == before, len(before))",
        FOURBIT_ISA="scalar",
    )
    # Nothing is loaded by importing; then the library finds torch's OpenMP and brings none of its own.
    assert run.stdout == "False\nscalar True 1\n"
