"""Adapters as stock PEFT writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.mixtures import folder, mixtral  # noqa: F401 - fixtures
from tests.tiny import llama

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make("a", r=4, ...) gives the folder of an adapter that stock PEFT wrote, its factors random."""

    def adapter(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
        model = get_peft_model(llama(tied=False), LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(dtype)
        target = tmp_path / name
        model.save_pretrained(str(target), save_embedding_layers=False)
        return target

    return adapter
