"""Triton kernels on a GPU where there is one, else on CPU tensors under Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Skipped(pytest.Module):
    """A module that is not imported, since it would import Triton."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        pytest.skip("Triton is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if find_spec("triton") is None:
        return _Skipped.from_parent(parent, path=module_path)
    return None


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def bf16_as_on_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.6 to 3.9) cuts bits off where cards round to bf16, restores bf16's subnormal
    numbers wrongly, and multiplies bf16 as integers.
    """
    if DEVICE.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    convert_any, multiply = interpreter._convert_float, builder.create_dot

    def convert(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return (value.astype(np.uint32) << 16).reshape(value.shape)
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert_any(value, source, target, mode)
        exact = torch.from_numpy(np.frombuffer(value.tobytes(), dtype=np.float32).copy())
        return exact.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(value.shape)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, *wide, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(builder, "create_dot", dot)
