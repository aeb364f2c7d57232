"""Whether a model keeps packed rows apart: found out by asking it, not from a list of architectures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourbit.errors import ConfigError
from fourbit.nn.loss import split_model

_ROW = 8


def check_packing(model: nn.Module, pad_id: int, device: torch.device) -> None:
    """Raise ConfigError unless a row packed behind another is blind to what that one holds.

    What the model makes of the second row must be the same to the bit, whatever the first one says: masked
    scores have a weight of exactly zero. State-space and linear-attention layers fail this.
    """
    decoder, _ = split_model(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            seen = [_second_row(decoder, first, pad_id, device) for first in (pad_id, pad_id + 1)]
    finally:
        model.train(was_training)
    if not torch.equal(*seen):
        raise ConfigError(
            f"train.packing: {type(decoder).__name__} lets packed rows see each other; "
            "leave the setting out to pad rows instead"
        )


def _second_row(decoder: nn.Module, first: int, pad_id: int, device: torch.device) -> Tensor:
    """The hidden states [8, H] of a row of pad tokens behind a row of `first`."""
    ids = torch.tensor([[first] * _ROW + [pad_id] * _ROW], device=device)
    positions = torch.arange(_ROW, device=device).repeat(2)[None]
    hidden: Tensor = decoder(
        input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden[0, _ROW:]
