"""A small Llama on the disk, and the same quantized by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourbit
from tests.tiny import save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "model", torch.float32)


def quantized(folder: Path, **settings: Any) -> Any:
    config = fourbit.FourBitConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(str(folder), quantization_config=config, dtype=torch.float32)
