"""Adapter folders: finding, summing up and reading them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourbit.errors import ModelError
from fourbit.model.adapter_folder import adapter_at, find_adapters, read_adapter, summarize
from fourbit.model.combine import combine
from tests.model.conftest import Make
from tests.model.test_combine import PATTERNS, layer_parts

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_summaries(make: Make) -> None:
    plain = summarize(make("a"))
    assert (plain.variant, plain.ranks, plain.alpha, plain.patterns) == ("LoRA", (4,), 8, False)
    assert plain.parameters == sum(a.numel() + b.numel() for a, b, _ in layer_parts(make("a")).values())
    assert plain.bytes > 4 * plain.parameters
    mixed = summarize(make("b", **PATTERNS, use_rslora=True, use_dora=True))
    assert (mixed.variant, mixed.ranks, mixed.patterns) == ("DoRA, rsLoRA", (2, 4, 6), True)
    few = summarize(make("c", target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"]))
    assert (few.targets, few.saved) == (("embed_tokens", "q_proj"), ("norm",))


def test_a_pickled_adapter_is_never_loaded(make: Make, tmp_path: Path) -> None:
    folder = make("a")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="only pickled weights, which are never loaded"):
        summarize(folder)
    with pytest.raises(ModelError, match="only pickled weights, which are never loaded"):
        combine([(folder, 1.0), (make("b"), 1.0)], tmp_path / "out", "cat")


def test_finding(make: Make, tmp_path: Path) -> None:
    places = [make("a"), make("run/adapter"), make("run/checkpoints/step-1/adapter")]
    assert find_adapters(tmp_path) == places[:2]
    assert find_adapters(places[2].parent) == [places[2]]
    assert adapter_at(tmp_path / "run") == adapter_at(places[1]) == places[1]
    with pytest.raises(ModelError, match="no such folder"):
        find_adapters(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no adapter here"):
        adapter_at(tmp_path)


def test_read(make: Make) -> None:
    adapter = read_adapter(make("a", **PATTERNS, use_rslora=True))
    parts = layer_parts(adapter.folder)
    assert adapter.layers.keys() == parts.keys()
    for name, layer in adapter.layers.items():
        assert layer.scaling == parts[name][2]
        assert torch.equal(layer.a.double(), parts[name][0])
    assert adapter.others == ()
