"""Whether a model keeps rows laid end to end apart: found out by asking it, not by its architecture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fourbit.nn.loss import split_model

_ROW = 8
#: How far the hidden states of a row may be from the same row's at another place, relative to their size:
#: rounding of 16-bit products, far below what another row's tokens or wrong positions bring.
_ROUNDING = 0.05


def keeps_rows_apart(model: nn.Module, pad_id: int, device: torch.device) -> bool:
    """Whether a row behind another is blind to what that one holds, and is what it would be by itself.

    What the model makes of the second row must be the same to the bit, whatever the first one says: masked
    scores have a weight of exactly zero. State-space and linear-attention layers fail this. Behind itself, a
    row must be what it is in front: models that count places instead of reading positions fail this.
    """
    decoder: Any = split_model(model)[0]
    words = int(decoder.get_input_embeddings().num_embeddings)
    row, other = ([(pad_id + step * place) % words for place in range(_ROW)] for step in (1, 2))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            front, behind = _halves(decoder, row + row, device)
            _, behind_other = _halves(decoder, [*other[1:], other[0], *row], device)
    finally:
        model.train(was_training)
    same = torch.linalg.vector_norm(behind - front) <= _ROUNDING * torch.linalg.vector_norm(front)
    return torch.equal(behind, behind_other) and bool(same)


def _halves(decoder: nn.Module, ids: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The hidden states [8, H], in fp32, of two rows laid end to end."""
    positions = torch.arange(_ROW, device=device).repeat(2)[None]
    tokens = torch.tensor([ids], device=device)
    hidden: Tensor = decoder(
        input_ids=tokens, attention_mask=None, position_ids=positions, use_cache=False
    ).last_hidden_state[0]
    return hidden[:_ROW].float(), hidden[_ROW:].float()
