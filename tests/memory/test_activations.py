"""Inputs of checkpointed layers that wait in a file: the same gradients, little memory, nothing left."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fourbit.errors import TrainingError
from fourbit.memory import activations
from fourbit.memory.activations import ActivationTier, checkpoint_activations
from fourbit.memory.tracker import PeakTracker
from tests.tiny import llama

DEPTH = 6


@pytest.fixture(autouse=True)
def _small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_SMALLEST", 1)


@pytest.fixture
def model() -> Any:
    made = llama(layers=DEPTH)
    checkpoint_activations(made)
    return made.train()


def backward(model: nn.Module, tokens: int = 9, seed: int = 0) -> list[torch.Tensor]:
    """Gradients of all weights."""
    model.zero_grad()
    ids = torch.randint(0, 250, (2, tokens), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["disk", "host"])
def test_gradients_have_the_same_bytes(tier: str, dtype: torch.dtype, model: Any, tmp_path: Path) -> None:
    model.to(dtype)
    wanted = [backward(model, tokens, tokens) for tokens in (9, 5, 12)]
    with ActivationTier(model, tier, tmp_path):
        found = [backward(model, tokens, tokens) for tokens in (9, 5, 12)]
        assert not list(tmp_path.iterdir())
    assert all(
        torch.equal(a, b)
        for one, two in zip(wanted, found, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    moved: list[object] = []
    with pytest.MonkeyPatch.context() as patch:  # afterwards everything is as it was
        patch.setattr(activations.ActivationFile, "_pack", lambda *args: moved.append(args))
        patch.setattr(activations, "save_on_cpu", lambda **options: moved.append(options))
        backward(model)
    assert not moved


def test_few_inputs_are_in_memory_at_a_time(model: Any, tmp_path: Path) -> None:
    """What the forward pass leaves behind does not grow with the depth."""

    def left(tier: str) -> int:
        with ActivationTier(model, tier, tmp_path), PeakTracker(model.parameters()) as tracker:
            loss = model(
                input_ids=torch.zeros(2, 512, dtype=torch.int64), use_cache=False, logits_to_keep=1
            ).logits.sum()
            gone = tracker.live
            loss.backward()
        return gone

    one = 2 * 512 * model.config.hidden_size * 4
    assert left("device") - left("disk") >= (DEPTH - activations.IN_MEMORY) * one


def test_a_step_that_was_given_up_leaves_its_room(model: Any, tmp_path: Path) -> None:
    wanted = backward(model)
    with ActivationTier(model, "disk", tmp_path):
        model(input_ids=torch.zeros(2, 9, dtype=torch.int64), use_cache=False)  # no backward
        one = model(input_ids=torch.zeros(2, 9, dtype=torch.int64), use_cache=False).logits.sum()
        found = backward(model)  # another graph meanwhile
        one.backward()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev", "preadv"])
def test_a_failing_disk_is_one_line(
    call: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, broken)
    message = (
        "no room for 0 MB of activations"
        if call == "posix_fallocate"
        else "activations cannot be read or written"
    )
    with ActivationTier(model, "disk", tmp_path), pytest.raises(TrainingError, match=message) as error:
        backward(model)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    monkeypatch.undo()
    assert backward(model)
