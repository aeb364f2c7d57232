"""How fast a run goes on this machine: a few of its decoder layers, timed for a few seconds.

Every layer of a decoder costs the same, so one alone and a few together give the cost of all of them and of
what is around them. Micro-batches of two sizes give a line in tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fourbit.config import RunConfig, TrainSettings
from fourbit.data.batch import Batch, collate
from fourbit.data.examples import length_of, lengths_of
from fourbit.data.render import Example
from fourbit.data.steps import batch_of, epoch_fill, groups
from fourbit.evaluate.context import transformers_model
from fourbit.evaluate.heldout import TOKENS_PER_BATCH
from fourbit.kernels import native
from fourbit.memory.activations import checkpoint_activations
from fourbit.memory.measure import release_free_memory
from fourbit.model.adapters import key_source
from fourbit.model.base import locate, read_config
from fourbit.model.compute import choose_compute_dtype
from fourbit.model.quantizer import fill_randomly
from fourbit.nn.attention import use_tiled_attention
from fourbit.nn.decoder import layer_list
from fourbit.nn.fused import fuse
from fourbit.nn.loss import causal_lm_loss, split_model
from fourbit.training.loop import steps_in_run, train_mode
from fourbit.training.rehearse import failing_clearly
from fourbit.training.skeleton import run_skeleton

#: Layers that are timed beside one alone: so many that they take about so many seconds, and at least so many,
#: or two where one alone takes very long.
_SECONDS, _FEWEST, _VERY_LONG = 0.6, 4, 3.0
#: A call is made once untimed and then so often, the shortest counts; a slow one is made once more only.
_TIMES, _SLOW = 3, 1.0
#: Layers that a shape alone is given.
_LAYERS = 8
#: Optimizer steps from whose micro-batches two are taken.
_STEPS = 8
#: Forward passes that a token's gradient costs: forward, backward, and recomputing.
_PASSES_KEEPING, _PASSES_RECOMPUTING = 3.0, 4.0


@dataclass(frozen=True)
class Pace:
    """Seconds of each micro-batch, of each of its tokens, and of each token of held-out rows."""

    batch: float
    token: float
    scored: float

    def step(self, settings: TrainSettings, train: Sequence[Example]) -> float:
        """Seconds of an optimizer step, on average."""
        fill = epoch_fill(train, settings)
        steps = math.ceil(len(train) / settings.effective_batch)
        return (fill.batches * self.batch + fill.computed * self.token) / steps

    def run(self, settings: TrainSettings, train: Sequence[Example], heldout: Sequence[Example]) -> float:
        """Seconds of a whole run, its evaluations included."""
        steps = steps_in_run(len(train), settings)
        evaluations = math.ceil(steps / settings.eval_every)
        return steps * self.step(settings, train) + evaluations * sum(lengths_of(heldout)) * self.scored


def measure_pace(
    model: Any,
    settings: TrainSettings,
    train: Sequence[Example],
    heldout: Sequence[Example] = (),
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    depth: int | None = None,
) -> Pace:
    """The pace of a model with the kernels that it will train with; gradients are cleared, weights stay.

    heldout  rows that evaluations score; none: the pace is given without them
    depth    the layers to give the pace for; None: as many as the model has

    Raises ModelError where its layers cannot be told apart.
    """
    if settings.activation_checkpointing:
        checkpoint_activations(transformers_model(model))
    rows = range(min(len(train), _STEPS * settings.effective_batch))
    sizes = sorted(groups(rows, train, settings), key=lambda g: sum(length_of(train, row) for row in g))
    device = next(model.parameters()).device
    small, large = (
        batch_of([train[row] for row in sizes[at]], 0, settings).to(device) for at in (len(sizes) // 4, -1)
    )

    def step(batch: Batch) -> None:
        train_mode(model)
        keys = key_source(model)
        if keys is not None:
            keys.set(settings.seed, 0, batch.rows, batch.position_ids)
        try:
            with autocast():
                loss, _ = causal_lm_loss(model, batch, settings.loss_chunk)
            loss.backward()
        finally:  # a run goes on where this fails, and must not begin with these gradients
            if keys is not None:
                keys.clear()
            model.zero_grad(set_to_none=True)

    def score(batch: Batch) -> None:
        model.eval()
        with torch.no_grad(), autocast():
            causal_lm_loss(model, batch, settings.loss_chunk)

    scored = 0.0
    few, many = small.input_ids.numel(), large.input_ids.numel()
    depth = depth or _depth(model)
    more = _seconds(model, depth, lambda: step(large))
    token = more / many
    if more > _SLOW * depth:
        passes = _PASSES_RECOMPUTING if settings.activation_checkpointing else _PASSES_KEEPING
        scored = token / passes
    else:
        if few < many:
            token = min(token, max(0.0, more - _seconds(model, depth, lambda: step(small))) / (many - few))
        if heldout:  # no more rows than an evaluation takes at once, whose memory is planned
            count = max(1, TOKENS_PER_BATCH // max(lengths_of(heldout)))
            batch = collate([heldout[row] for row in range(min(count, len(heldout)))], 0).to(device)
            scored = _seconds(model, depth, lambda: score(batch)) / batch.input_ids.numel()
    release_free_memory()
    return Pace(more - token * many, token, scored)


def step_seconds(config: RunConfig) -> float:
    """What an optimizer step of a run takes on this machine's CPU, its rows data.max_length tokens long.

    No weights are read, random ones stand for them: a few layers, and embeddings and head as they are.
    Raises ModelError or ConfigError as loading would.
    """
    settings, length = config.train, config.data.max_length
    dtype = choose_compute_dtype(config.model.compute_dtype, torch.device("cpu")).dtype
    place = locate(config.model.path, config.model.revision)
    whole = read_config(place, place.is_file(), config.model.trust_remote_code)
    model: Any = run_skeleton(config, dtype, _LAYERS)
    fill_randomly(model.to_empty(device="cpu"))
    if settings.fused and native.available():
        use_tiled_attention(transformers_model(model))
        fuse(transformers_model(model))
    trained = [False] + [True] * (length - 1)
    rows = [Example([0] * length, trained, row, "", 1) for row in range(settings.effective_batch)]
    mixed = config.lora is None and dtype != torch.float32
    within = (lambda: torch.autocast("cpu", dtype)) if mixed else nullcontext
    depth = int(whole.get_text_config().num_hidden_layers)
    return measure_pace(model, settings, rows, (), within, depth).step(settings, rows)


def _seconds(model: Any, depth: int, call: Callable[[], None]) -> float:
    """What a call takes through so many layers of a model, from what it takes through some."""
    device = next(model.parameters()).device
    with _layers(model, 1):
        one = _timed(call, device)
    if _depth(model) == 1:
        return depth * one
    fewest = _FEWEST if one < _VERY_LONG else 2
    several = min(_depth(model), max(fewest, int(_SECONDS / max(one, 1e-6))))
    with _layers(model, several):
        each = (_timed(call, device) - one) / (several - 1)
    return one + (depth - 1) * max(0.0, each)


def _timed(call: Callable[[], None], device: torch.device) -> float:
    taken: list[float] = []
    while len(taken) <= _TIMES:
        start = time.monotonic()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.monotonic() - start)
        if len(taken) == 2 and taken[1] > _SLOW:
            break
    return min(taken[1:])


def _depth(model: Any) -> int:
    return int(transformers_model(model).config.get_text_config().num_hidden_layers)


@contextmanager
def _layers(model: Any, count: int) -> Iterator[None]:
    """A block in which a model has only the first of its decoder layers."""
    text, depth = transformers_model(model).config.get_text_config(), _depth(model)
    owner, name = layer_list(split_model(model)[0], depth)
    whole = getattr(owner, name)
    setattr(owner, name, nn.ModuleList(list(whole)[:count]))
    text.num_hidden_layers = count
    try:
        with failing_clearly("time", transformers_model(model)):
            yield
    finally:
        setattr(owner, name, whole)
        text.num_hidden_layers = depth
