"""Prompts prefilled in batches: one KV cache for rows of different lengths.

A `Context` is a KV cache with the position that each of its slots holds in each row. Its mask is made
from those positions, so a slot may hold anything: prompts share a prefix that is computed once and is
followed by padding, rows leave, and branches of a tree of continuations lie side by side. Slots of one
batch, two rows, prefix of three tokens:

    positions   0 1 2  3 4 5 6      a row of seven tokens
                0 1 2  - - 3 4      a row of five; `-` is padding, seen by no token

Chat templates begin every prompt alike: of 43 tokens of a short request to SmolLM2, 23 are the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fourbit.errors import DataError, ModelError
from fourbit.evaluate.attention import evaluation_attention
from fourbit.evaluate.batching import length_batches
from fourbit.evaluate.cache import changed_cache, empty_cache
from fourbit.evaluate.stack import Decoding
from fourbit.nn.loss import split_model

Progress = Callable[[int, int], None]

#: The position of a slot that no token may see.
PADDING = -1
#: Prompt tokens per prefill, padding included: bounds the memory of activations.
_PREFILL_TOKENS = 4096
#: A shared prefix shorter than this is not worth a forward pass of its own.
_SHORTEST_PREFIX = 8


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """What every forward pass here runs under: evaluation mode, no gradients, attention with masks."""
    with evaluating(model), torch.inference_mode(), evaluation_attention(transformers_model(model)):
        yield


def transformers_model(model: Any) -> Any:
    """The transformers model, which PEFT may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Context:
    """B sequences in one KV cache, to be extended.

    cache      S slots of keys and values per layer, [B, heads, S, head_dim]
    positions  int64 [B, S]  the position in its sequence of what each slot holds, or PADDING
    logits     [B, V]        of the last token of each prompt
    decoding   what contexts of the same model and adapter share
    """

    def __init__(
        self,
        model: nn.Module,
        cache: DynamicCache,
        positions: Tensor,
        logits: Tensor,
        decoding: Decoding | None = None,
    ) -> None:
        self.model, self.cache, self.positions, self.logits = model, cache, positions, logits
        self._decoding = Decoding() if decoding is None else decoding

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: the position that the next token of each row takes."""
        return self.positions.amax(dim=1) + 1

    def extend(self, ids: Tensor, positions: Tensor, visible: Tensor | None = None, last: int = 0) -> Tensor:
        """Append T slots to every row; returns the logits of the last `last` of them (0: of all), [B, T', V].

        ids        int64 [B, T]
        positions  int64 [B, T]         PADDING where a row has nothing to add
        visible    bool  [B, T, S + T]  which slots each new token sees; by default those of its row up to
                                        its own position
        """
        known = torch.cat([self.positions, positions], dim=1)
        single = visible is None and ids.shape[1] == 1 and self.positions.shape[1] > 0
        if single and (hidden := self._decoding.step(ids, known, self.cache)) is not None:
            self.positions = known
            return self._logits(hidden)
        if visible is None:
            visible = (known[:, None] >= 0) & (known[:, None] <= positions[:, :, None])
        # Attention over nothing is NaN, so padding sees its own slot.
        own = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        visible[:, :, -ids.shape[1] :] |= own & (positions == PADDING)[:, :, None]
        decoder, _ = split_model(self.model)
        with self._decoding.learning(self.model, known, self.cache) if single else nullcontext():
            hidden = decoder(
                input_ids=ids,
                attention_mask=_layer_masks(_config(self.model), visible, positions, known),
                position_ids=positions.clamp(min=0),
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        self.positions = known
        return self._logits(hidden[:, -last:] if last else hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        _, head = split_model(self.model)
        return head.logits(hidden.flatten(0, 1).contiguous()).unflatten(0, hidden.shape[:2])

    def fork(self) -> Context:
        """A second context over the same prompts; neither sees what the other appends.

        The prompts' keys and values are copied when the second is first extended.
        """
        copy = changed_cache(self.cache, lambda tensor: tensor)
        return Context(self.model, copy, self.positions, self.logits, self._decoding)

    def crop(self, length: int) -> None:
        """Keep the first `length` slots of every row."""
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.truncate(length)
        self.positions = self.positions[:, :length]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (int64 [n])."""
        self.cache = changed_cache(self.cache, lambda tensor: tensor.index_select(0, rows))
        self.positions, self.logits = self.positions[rows], self.logits[rows]


@dataclass(frozen=True, slots=True)
class Prefix:
    """What all prompts begin with, computed once; tokens 0 means nothing is shared."""

    tokens: int
    cache: DynamicCache


def prefill(
    model: nn.Module, prompts: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], Context]]:
    """Contexts of at most `batch_size` prompts of similar length, the longest first, with their indices.

    prompts: token ids, none empty. To be iterated under `inference(model)`. Raises DataError for an empty
    prompt, ModelError for an architecture whose memory is not a KV cache.
    """
    check_prompts(model, prompts)
    if not prompts:
        return
    device = next(model.parameters()).device
    prefix, decoding = _prefix(model, prompts, device), Decoding()
    lengths = [len(prompt) - prefix.tokens for prompt in prompts]
    for indices in length_batches(lengths, _PREFILL_TOKENS, batch_size):
        rows = [prompts[index][prefix.tokens :] for index in indices]
        yield indices, _prefill(model, prefix, rows, device, decoding)


def _prefix(model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> Prefix:
    first, shared = prompts[0], 0
    # Every row keeps a token of its own, whose logits begin its answer.
    most = min(len(prompt) for prompt in prompts) - 1 if len(prompts) > 1 else 0
    while shared < most and all(prompt[shared] == first[shared] for prompt in prompts):
        shared += 1
    if shared < _SHORTEST_PREFIX:
        return Prefix(0, empty_cache())
    nothing = torch.empty(1, 0, dtype=torch.int64, device=device)
    context = Context(model, empty_cache(), nothing, torch.empty(0))
    ids = torch.tensor([list(first[:shared])], device=device)
    context.extend(ids, torch.arange(shared, device=device)[None], last=1)
    return Prefix(shared, context.cache)


def _prefill(
    model: nn.Module, prefix: Prefix, rows: list[Sequence[int]], device: torch.device, decoding: Decoding
) -> Context:
    """Rows aligned at their ends, so that the last slot holds the last token of each."""
    batch, longest = len(rows), max(len(row) for row in rows)
    ids = torch.zeros(batch, longest, dtype=torch.int64)
    positions = torch.full((batch, longest), PADDING, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        positions[index, longest - len(row) :] = torch.arange(prefix.tokens, prefix.tokens + len(row))
    shared = torch.arange(prefix.tokens, device=device).expand(batch, -1)
    cache = changed_cache(prefix.cache, lambda tensor: tensor.expand(batch, -1, -1, -1))
    context = Context(model, cache, shared, torch.empty(0), decoding)
    context.logits = context.extend(ids.to(device), positions.to(device), last=1)[:, -1]
    return context


def _config(model: nn.Module) -> Any:
    return transformers_model(model).config.get_text_config()


def _layer_kinds(config: Any) -> set[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}
    return set(kinds)


def _layer_masks(config: Any, visible: Tensor, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
    """What transformers takes as attention mask: [B, 1, T, S], or one for each kind of layer."""
    kinds, window = _layer_kinds(config), getattr(config, "sliding_window", None)
    full = _as_mask(config, visible)
    if "sliding_attention" not in kinds or window is None or int(keys.max()) < window:
        return full
    near = _as_mask(config, visible & (queries[:, :, None] - keys[:, None] < window))
    return near if kinds == {"sliding_attention"} else {"full_attention": full, "sliding_attention": near}


def _as_mask(config: Any, visible: Tensor) -> Tensor:
    if config._attn_implementation != "eager":
        return visible[:, None]
    # Eager attention adds its mask to the scores.
    lowest = torch.finfo(torch.float32).min / 2
    return torch.where(visible[:, None], 0.0, lowest)


def check_prompts(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    """Raise DataError for an empty prompt, ModelError for an architecture whose memory is not a KV cache."""
    config = _config(model)
    unknown = _layer_kinds(config) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(
            f"{config.model_type}: batched evaluation needs layers with a plain KV cache, this model has "
            f"{', '.join(sorted(unknown))}; evaluate with the model's own generate()"
        )
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index + 1} has no tokens; give the model something to answer")
