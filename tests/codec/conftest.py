"""Every implementation of the codec behind one fixture, so that each test runs on all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fourbit.kernels import native
from fourbit.ops import library

IMPLEMENTATIONS = ("reference", *(native.isas() if native.available() else ()))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let CPU operators run the reference, or native code with one instruction set."""
    if request.param == "reference":
        monkeypatch.setattr(library, "_native_loaded", lambda: False)
        yield request.param
        return
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=IMPLEMENTATIONS[1:])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Let native code run one instruction set."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Let torch, and with it native code, use a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
