"""A training step without memory: the code that trains, run on tensors that have only shapes.

A few decoder layers are enough, since every further one keeps the same. What is counted is what a micro-batch
needs beside weights, adapters, gradients and optimizer states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.codebooks import codebook
from fourbit.errors import ModelError
from fourbit.memory.activations import checkpoint_activations, keep_activations
from fourbit.memory.tracker import PeakTracker, fake_tensors
from fourbit.model.adapters import key_source
from fourbit.nn.attention import use_tiled_attention
from fourbit.nn.decoder import layer_list
from fourbit.nn.fused import fuse
from fourbit.nn.loss import head_loss, split_model
from fourbit.nn.packed import packed_parts
from fourbit.training.loop import train_mode

#: Decoder layers of the two rehearsals whose difference is one layer's share.
_FEW, _MORE = 1, 2


@dataclass(frozen=True)
class Needs:
    """Bytes that a micro-batch takes in the decoder.

    kept     what stands after the forward pass through all layers: inputs of layers, or with activation
             checkpointing off everything that backward reads
    highest  the peak of going forward and back, `kept` included
    layer    one layer's share of `kept`
    free     blocks of the kernels' pool that are free beside `kept`
    """

    kept: int
    highest: int
    layer: int = 0
    free: int = 0


class Rehearsal:
    """Rehearses steps of a run's skeleton (`run_skeleton`), which it uses up.

    fused   whether attention, norms and MLPs are ours
    pooled  whether what kernels return lies in their pool
    """

    def __init__(self, model: Any, fused: bool, pooled: bool) -> None:
        self._model, self._pooled = model, pooled
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder, self._head = split_model(model)
        self._hidden = int(self._base.config.get_text_config().hidden_size)
        self._vocabulary = int(self._base.config.get_text_config().vocab_size)
        self.depth = int(self._base.config.get_text_config().num_hidden_layers)
        self._owner, self._name = layer_list(decoder, self.depth)
        self._list = list(getattr(self._owner, self._name))[:_MORE]
        for part in packed_parts(model):  # what fake tensors would otherwise leave in the cache
            codebook(part.matrices()[0].quant_type, torch.device("cpu"))
            break
        self._dtype = self._base.dtype
        self._use_layers(_MORE)
        if fused:
            fuse(self._base)  # outside the mode: classes are tried on real numbers
        self._mode = fake_tensors()
        with self._mode:
            model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            if fused:
                use_tiled_attention(self._base)

    @lru_cache(maxsize=64)  # noqa: B019 - a rehearsal lives as long as its planner
    def layers(self, rows: int, tokens: int, checkpointing: bool) -> Needs:
        """Rows padded to `tokens` through the decoder and back; beyond two rows along a line."""
        if rows > 2:
            one, two = (self.layers(n, tokens, checkpointing) for n in (1, 2))
            return _line(one, two, rows - 2)
        if checkpointing:
            checkpoint_activations(self._base)
        else:
            keep_activations(self._base)
        train_mode(self._model)
        return self._at_full_depth(rows, tokens)

    @lru_cache(maxsize=64)  # noqa: B019
    def forward(self, rows: int, tokens: int) -> Needs:
        """The same without gradients, as held-out rows are scored."""
        if rows > 2:
            return _line(self.forward(1, tokens), self.forward(2, tokens), rows - 2)
        self._model.eval()
        with torch.no_grad():  # nothing is kept, so that two layers need what all do
            return self._run(min(self.depth, _MORE), rows, tokens)

    def loss(self, rows: int, tokens: int, trained: int, chunk: int, gradient: bool = True) -> int:
        """What the loss of `trained` labelled positions takes beside the hidden states of all."""
        weight = next(self._head.module.parameters())
        at_once = max(1, chunk * 2**20 // (4 * self._vocabulary))
        shown = min(trained, 2 * at_once)  # further chunks come and go as the second does
        with self._mode, failing_clearly("memory", self._base):
            hidden = torch.empty(rows, tokens, self._hidden, dtype=self._dtype, requires_grad=gradient)
            labels = torch.zeros(shown, dtype=torch.int64)
            with PeakTracker([hidden, weight]) as tracker, torch.set_grad_enabled(gradient):
                head_loss(_taken(hidden, shown), self._head, labels, chunk)
        copies = 2 if gradient else 1  # the labelled hidden states, and their gradient
        return tracker.peak + copies * (trained - shown) * self._hidden * self._dtype.itemsize

    def _at_full_depth(self, rows: int, tokens: int) -> Needs:
        counts = [min(self.depth, n) for n in (_FEW, _MORE)]
        few = self._run(counts[0], rows, tokens)
        # Before the second micro-batch the kernels' pool is as the first one left it.
        more = self._run(counts[1], rows, tokens, passes=2 if self._pooled else 1)
        layer = more.kept - few.kept
        kept = more.kept + (self.depth - counts[1]) * layer
        # One layer at a time goes back.
        return Needs(kept, kept + more.highest - more.kept, layer, more.free)

    def _run(self, layers: int, rows: int, tokens: int, passes: int = 1) -> Needs:
        self._use_layers(layers)
        with self._mode, failing_clearly("memory", self._base):
            ids = torch.zeros(rows, tokens, dtype=torch.int64)
            positions = torch.arange(tokens).expand(rows, tokens).contiguous()
            mask = torch.ones_like(ids)
            keys = key_source(self._model)
            if keys is not None:
                keys.set(0, 0, ids[:, 0].contiguous(), positions)
            decoder, _ = split_model(self._model)
            with PeakTracker(self._there(), self._pooled) as tracker:
                for _ in range(passes):
                    hidden = decoder(
                        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                    ).last_hidden_state
                    kept, free = tracker.used, tracker.live - tracker.used
                    if hidden.requires_grad:
                        gradient = torch.empty_like(hidden)
                        hidden.backward(gradient)
                        del gradient
                    del hidden
            if keys is not None:
                keys.clear()
        return Needs(kept, tracker.peak, free=free)

    def _there(self) -> Iterator[Tensor]:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            yield tensor
            if tensor.grad is not None:
                yield tensor.grad

    def _use_layers(self, count: int) -> None:
        setattr(self._owner, self._name, nn.ModuleList(self._list[:count]))
        self._base.config.get_text_config().num_hidden_layers = count


def _taken(hidden: Tensor, trained: int) -> Tensor:
    """A copy of the labelled positions, as indexing makes one."""
    return hidden.flatten(0, 1)[torch.zeros(trained, dtype=torch.int64)]


def _line(first: Needs, second: Needs, further: int) -> Needs:
    """Where two neighbours lead in so many further steps."""
    return Needs(
        second.kept + further * (second.kept - first.kept),
        second.highest + further * (second.highest - first.highest),
        second.layer + further * (second.layer - first.layer),
        second.free + further * (second.free - first.free),
    )


@contextmanager
def failing_clearly(what: str, base: nn.Module) -> Iterator[None]:
    """A block that runs a model's own code to predict something; whatever that raises is a ModelError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"{what} of {type(base).__name__} cannot be predicted ({reason})") from error
