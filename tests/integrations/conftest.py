"""A small Llama on the disk, the same quantized by transformers, and steps to compare trainers with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourbit
from fourbit.data.batch import Batch
from fourbit.nn.loss import causal_lm_loss
from tests.tiny import save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "model", torch.float32)


def losses_of_our_loss(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[float]:
    """One step of torch's AdamW for each of a collator's batches, as `Trainer` takes it, with our loss."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0), []
    for made in batches:
        ids = made["input_ids"]
        positions, numbers = torch.arange(ids.shape[1]).expand_as(ids), torch.arange(ids.shape[0])
        batch = Batch(ids, made["attention_mask"], made["labels"], positions, numbers)
        total, count = causal_lm_loss(model, batch)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
    return losses


def quantized(folder: Path, **settings: Any) -> Any:
    config = fourbit.FourBitConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(str(folder), quantization_config=config, dtype=torch.float32)
