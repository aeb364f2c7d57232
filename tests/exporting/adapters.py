"""Adapters that stock PEFT has made and saved, and what PEFT makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel


def save_adapter(model: PreTrainedModel, folder: Path, seed: int = 1, **options: Any) -> Path:
    """A LoRA adapter with random weights in all its parts, magnitudes and replaced modules included."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied weights and fan_in_fan_out
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def load_with_peft(base: Path, adapter: Path) -> PeftModel:
    """Stock transformers and stock PEFT, in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
        return PeftModel.from_pretrained(model, str(adapter)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(3, 40)[None]).logits
    return result
