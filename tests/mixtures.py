"""Tiny mixtures of experts: the fixtures of the tests of models and of exports (their conftest.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.model.test_architectures import save

KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 2},
}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(tmp_path / "model", request.param, **KINDS[request.param])


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return save(tmp_path / "model", "mixtral", **KINDS["mixtral"])
