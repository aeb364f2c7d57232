"""Weights streamed from host memory. Without a card the same code copies from memory to memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit
from fourbit.config import RunConfig
from fourbit.config_file import resolve
from fourbit.errors import ConfigError, MemoryBudgetError
from fourbit.memory.activations import checkpoint_activations
from fourbit.memory.host import HostStream
from fourbit.memory.plan import Choice
from fourbit.memory.stream import hold_weights, stream_from_host, stream_of
from fourbit.training.planner import Planner
from fourbit.training.target import Rows, Target
from tests.tiny import byte_tokenizer, llama

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama(layers=LAYERS).save_pretrained(str(path))
    byte_tokenizer().save_pretrained(str(path))
    return path


def load(folder: Path, streamed: bool) -> Any:
    """In fp32, so that nothing depends on which products a device has."""
    place = "cpu" if streamed else DEVICE.type
    model, _ = fourbit.load(folder, compute_dtype="float32", device=place)
    if streamed:
        stream_from_host(model, list(model.model.layers), DEVICE)
    return model


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradients of an adapter."""
    model.train()
    loss = model(torch.arange(3, 40, device=DEVICE)[None], use_cache=False).logits.square().mean()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), grads


def adapted(base: Any) -> Any:
    model = fourbit.add_lora(base, r=4, dropout=0.0, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator(DEVICE).manual_seed(1))
    checkpoint_activations(model.get_base_model())
    return model


def test_the_same_steps(folder: Path) -> None:
    held, streamed = (adapted(load(folder, streamed)) for streamed in (False, True))
    stream = stream_of(streamed)
    assert isinstance(stream, HostStream)
    for _ in range(3):
        (loss, grads), (other, theirs) = step(held), step(streamed)
        assert loss == other
        assert grads.keys() == theirs.keys()
        assert all(torch.equal(grads[name], theirs[name]) for name in grads)
    assert {p.device.type for p in streamed.parameters() if p.dtype != torch.uint8} == {DEVICE.type}


def test_what_is_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up in the forward pass, down while layers are recomputed, each layer once; two are there at a time."""
    model = adapted(load(folder, streamed=True))
    stream = stream_of(model)
    assert isinstance(stream, HostStream)
    copied: list[int] = []
    fetch = HostStream._fetch

    def counted(self: HostStream, number: int, keep: int) -> int:
        if number not in self._holds:
            copied.append(number)
        place = fetch(self, number, keep)
        assert keep < 0 or keep in self._holds
        return place

    monkeypatch.setattr(HostStream, "_fetch", counted)
    for _ in range(2):
        step(model)
    up, down = list(range(LAYERS)), list(range(LAYERS - 3, -1, -1))
    assert copied == [*up, *down, *up[2:], *down]
    assert stream.bytes_read == sum(stream._layers[number].host.numel() for number in copied)


def test_what_is_not_there_lies_in_host_memory(folder: Path) -> None:
    """Names, bytes and the hash of a model are those of one that is held."""
    held, streamed = (load(folder, streamed) for streamed in (False, True))
    with torch.no_grad():
        ids = torch.arange(3, 40, device=DEVICE)[None]
        assert torch.equal(held(ids).logits, streamed(ids).logits)
    theirs = dict(streamed.named_parameters())
    assert all(torch.equal(p.cpu(), theirs[name].cpu()) for name, p in held.named_parameters())
    there = [name for name, p in theirs.items() if p.dtype == torch.uint8 and _is_in_a_slot(streamed, p)]
    assert {name.split(".")[2] for name in there} == {str(LAYERS - 1)}
    hold_weights(streamed)
    assert stream_of(streamed) is None
    assert {p.device.type for p in streamed.parameters()} == {DEVICE.type}
    assert torch.equal(held(ids).logits, streamed(ids).logits)


def _is_in_a_slot(model: Any, parameter: torch.nn.Parameter) -> bool:
    stream = stream_of(model)
    assert isinstance(stream, HostStream)
    return any(
        slot.data_ptr() <= parameter.data_ptr() < slot.data_ptr() + slot.numel() for slot in stream._slots
    )


def settings(folder: Path, **model: Any) -> RunConfig:
    return resolve(
        {"model": {"path": str(folder), **model}, "data": {"train": "rows.jsonl"}, "lora": {"r": 4}}
    )


def test_a_budget_puts_them_there(folder: Path) -> None:
    target = Target("some card", False, torch.bfloat16, 10**9)
    planner = Planner(settings(folder), target, Rows(longest=64, count=32), runtime=10**8)
    host, held = (planner.plan(Choice(1, True, 24, None, tier)) for tier in ("host", "device"))
    part = next(part for part in host.held if part.name == "packed weights")
    whole = planner.weights.codes + planner.weights.scales
    assert (part.tier, part.size) == ("host", -(-2 * whole // LAYERS))
    assert held.peak - host.peak == whole - part.size
    least = planner.plan(Choice(1, True, 6, 0, "host", "host")).most
    chosen = planner.choose(least).choice
    assert chosen.weight_tier == "host"
    assert "weights in host memory" in chosen.text()
    assert planner.choose(2 * held.peak).choice.weight_tier == "device"
    with pytest.raises(MemoryBudgetError, match="weights in host memory"):
        planner.choose(least - 1)


def test_where_that_means_nothing(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"only beside a GPU; set model\.weight_tier to device"):
        fourbit.load(folder, device="cpu", weight_tier="host")
    with pytest.raises(ConfigError, match="weight_tier 'card': must be device, host or disk"):
        fourbit.load(folder, device="cpu", weight_tier="card")
    with pytest.raises(ConfigError, match=r"weight_tier: host .* needs train\.activation_checkpointing"):
        resolve(
            {
                "model": {"path": str(folder), "weight_tier": "host"},
                "data": {"train": "rows.jsonl"},
                "train": {"activation_checkpointing": False},
            }
        )
