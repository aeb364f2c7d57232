"""What a model has read of one text, kept so that a longer text costs its new tokens only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fourbit.evaluate.cache import empty_cache
from fourbit.evaluate.context import Context, check_prompts

#: Tokens per forward pass: bounds the memory of activations.
_TOKENS = 512


class PromptCache:
    """The token ids that one model has read, and their keys and values.

    A text that begins like the one before is read from where they part. Holds for one model with one
    adapter: another one's keys and values differ.
    """

    def __init__(self) -> None:
        self._context: Context | None = None
        self._ids: list[int] = []
        #: Tokens that were given to the model so far.
        self.tokens_read = 0

    def read(self, model: nn.Module, ids: Sequence[int]) -> Tensor:
        """The logits [1, V] that follow these ids. To be called under `inference(model)`.

        Raises DataError without ids, ModelError for an architecture whose memory is not a KV cache.
        """
        check_prompts(model, [ids])
        wanted = list(ids)
        # The last token is always read: its logits are wanted.
        shared = min(_shared(self._ids, wanted), len(wanted) - 1)
        # Also drops what an interruption left behind in some of the layers.
        context = self._cropped(model, shared)
        for start in range(shared, len(wanted), _TOKENS):
            chunk = wanted[start : start + _TOKENS]
            device = context.positions.device
            places = torch.arange(start, start + len(chunk), device=device)[None]
            context.logits = context.extend(torch.tensor([chunk], device=device), places, last=1)[:, -1]
            self._ids += chunk
            self.tokens_read += len(chunk)
        return context.logits

    def _cropped(self, model: nn.Module, length: int) -> Context:
        if self._context is None or length == 0:
            device = next(model.parameters()).device
            nothing = torch.empty(1, 0, dtype=torch.int64, device=device)
            self._context = Context(model, empty_cache(), nothing, torch.empty(0))
        else:
            self._context.crop(length)
        self._ids = self._ids[:length]
        return self._context


def _shared(one: list[int], other: list[int]) -> int:
    """How many ids both begin with."""
    if other[: len(one)] == one:
        return len(one)
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
