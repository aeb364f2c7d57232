"""What the loop works on, and which part of it is this process's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourbit.config import RunConfig, TrainSettings, learning_rate_for
from fourbit.data.examples import Examples
from fourbit.data.render import Example
from fourbit.model.adapters import parameter_counts
from fourbit.model.compute import choose_compute_dtype, choose_device
from fourbit.processes import ALONE, Processes
from fourbit.training.shards import shard_base


@dataclass(frozen=True)
class Work:
    """Everything the loop needs, prepared.

    learning_rate   the peak of the schedule
    autocast_dtype  compute dtype where trained weights are fp32 inside 16-bit layers, else None
    folder          of the run; another one in processes that do not lead
    """

    model: nn.Module
    train: Sequence[Example]
    heldout: Sequence[Example]
    pad_id: int
    settings: TrainSettings
    learning_rate: float
    autocast_dtype: torch.dtype | None
    folder: Path
    device: torch.device
    processes: Processes = ALONE


def make_work(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    examples: Examples,
    heldout: Examples,
    folder: Path,
) -> Work:
    """The work of a run in one process; `folder` is where it writes."""
    _, total = parameter_counts(model)
    rate = config.train.learning_rate
    device = next(model.parameters()).device
    return Work(
        model=model,
        train=examples,
        heldout=heldout,
        pad_id=int(tokenizer.pad_token_id),
        settings=config.train,
        learning_rate=learning_rate_for(total) if rate == "auto" else rate,
        autocast_dtype=_autocast_dtype(model, config, device),
        folder=folder,
        device=device,
    )


def share_work(processes: Processes, work: Work, config: RunConfig, console: Console) -> Work:
    """The work of this one of the processes; the base is shared out where the settings say so."""
    if processes.size == 1:
        if config.train.shard_weights:
            console.print("train.shard_weights: one process has nobody to share with", highlight=False)
        return work
    shared = config.train.shard_weights
    if shared:
        assert isinstance(work.model, PeftModel)
        device = choose_device(config.model.device)
        shard_base(work.model, device)
        work = replace(work, device=device)
    packed = work.settings.packing is not None  # how many packs a step has, its rows say
    per_step = (
        processes.size if packed else math.ceil(work.settings.effective_batch / work.settings.micro_batch)
    )
    few = f", of which {processes.size - per_step} idle" if per_step < processes.size else ""
    how = "each with a share of the base" if shared else "each with the whole base"
    console.print(f"{processes.size} processes{few}, {how}", highlight=False, soft_wrap=True)
    return replace(work, processes=replace(processes, together=shared))


def _autocast_dtype(
    model: PreTrainedModel | PeftModel, config: RunConfig, device: torch.device
) -> torch.dtype | None:
    """The compute dtype where weights beside LoRA's train in fp32, so that products still run in 16 bits."""
    only_lora = all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    dtype = choose_compute_dtype(config.model.compute_dtype, choose_device(str(device))).dtype
    return None if only_lora or dtype == torch.float32 else dtype


def autocast(work: Work) -> AbstractContextManager[object]:
    """The block that a run's forward passes are computed in."""
    if work.autocast_dtype is None:
        return nullcontext()
    return torch.autocast(work.device.type, work.autocast_dtype)
