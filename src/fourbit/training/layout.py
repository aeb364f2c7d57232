"""How the rows of a micro-batch lie: end to end, or below one another with padding (`train.padding_free`)."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import nn

from fourbit.config import RunConfig
from fourbit.errors import ConfigError
from fourbit.model.compute import choose_compute_dtype
from fourbit.nn.attention import NAME
from fourbit.nn.loss import split_model
from fourbit.nn.packed import packed_parts
from fourbit.nn.packing import keeps_rows_apart
from fourbit.ops.linear import multiplies_panels


def takes_any_length(dtype: torch.dtype, packed: int) -> bool:
    """Whether a CPU multiplies any number of tokens at the same cost.

    packed  values of the packed weights

    oneDNN compiles and keeps code for each number of rows that a bf16 product has (docs/log.md), our own
    product with packed weights and fp32 do not.
    """
    return dtype == torch.float32 or multiplies_panels(torch.empty(1, 1, dtype=dtype), packed)


def settled(config: RunConfig, model: nn.Module, pad_id: int, console: Console) -> RunConfig:
    """The settings with `train.padding_free` true or false, for a model that computes as it will in training.

    Under `train.packing` it stays as it is.

    Raises ConfigError where rows are to lie end to end and the model does not keep them apart.
    """
    train, asked = config.train, config.train.end_to_end
    wanted = asked or (train.padding_free is None and _costs_nothing(config, model))
    device = next(model.parameters()).device
    if wanted and train.effective_batch > 1 and not keeps_rows_apart(model, pad_id, device):
        why = f"{type(split_model(model)[0]).__name__} lets rows laid end to end see each other"
        if asked:
            key = "padding_free" if train.packing is None else "packing"
            raise ConfigError(f"train.{key}: {why}; leave the setting out to pad rows instead")
        console.print(f"rows are padded: {why}", highlight=False)
        wanted = False
    if train.packing is not None:
        return config
    return config.model_copy(update={"train": train.model_copy(update={"padding_free": wanted})})


def _costs_nothing(config: RunConfig, model: nn.Module) -> bool:
    """Whether rows end to end take no mask of all tokens by all, and no code for each of their lengths."""
    decoder: Any = split_model(model)[0]
    device = next(model.parameters()).device
    if device.type != "cpu" or decoder.config._attn_implementation != NAME:
        return False
    dtype = choose_compute_dtype(config.model.compute_dtype, device).dtype
    packed = any(True for _ in packed_parts(model))
    return takes_any_length(dtype, int(packed))
