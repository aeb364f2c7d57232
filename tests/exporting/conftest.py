"""A tiny base and an adapter for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.exporting.adapters import save_adapter
from tests.mixtures import folder, mixtral  # noqa: F401 - fixtures
from tests.tiny import llama, save_llama


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fp32 model folder whose head is a matrix of its own."""
    return save_llama(tmp_path_factory.mktemp("base") / "model", torch.float32, tied=False)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for it."""
    return save_adapter(llama(tied=False), tmp_path_factory.mktemp("adapter") / "adapter")
