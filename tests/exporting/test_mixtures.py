"""Mixtures of experts: merged and quantized expert by expert, and written as their base is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fourbit
from fourbit.cli.main import main
from fourbit.errors import ModelError
from fourbit.exporting import adapter as adapters
from fourbit.exporting import merge
from fourbit.exporting.bnb import write_bnb
from fourbit.exporting.streamed import stream_model
from fourbit.model.formats.lazy import LazyStack
from tests.model.test_architectures import load, logits, save
from tests.model.test_mixtures import adapted, pack, same_bytes

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    adapted(load(folder)).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def with_transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_merge_is_stock_pefts(folder: Path, adapter: Path, tmp_path: Path) -> None:
    fourbit.merge(folder, tmp_path / "merged", adapter=adapter, into="original", dtype="float32")
    assert names(tmp_path / "merged") == names(folder)
    stock = PeftModel.from_pretrained(with_transformers(folder), str(adapter))
    torch.testing.assert_close(
        logits(with_transformers(tmp_path / "merged")), logits(stock), rtol=1e-5, atol=1e-5
    )


def test_a_merge_into_restored_weights_is_the_trained_model(
    folder: Path, adapter: Path, tmp_path: Path
) -> None:
    fourbit.merge(folder, tmp_path / "merged", adapter=adapter, into="dequantized", dtype="float32")
    assert names(tmp_path / "merged") == names(folder)
    wanted = logits(adapted(load(folder)))
    torch.testing.assert_close(logits(with_transformers(tmp_path / "merged")), wanted, rtol=1e-5, atol=1e-5)


def test_a_packed_base_is_merged_too(folder: Path, adapter: Path, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "packed")
    fourbit.merge(packed, tmp_path / "merged", adapter=adapter, dtype="float32", any_base=True)
    wanted = logits(adapted(load(folder)))
    torch.testing.assert_close(logits(with_transformers(tmp_path / "merged")), wanted, rtol=1e-5, atol=1e-5)


def test_the_command_packs_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(folder), str(tmp_path / "packed")]) == 0
    assert "12 layers and stacks of experts in nf4" in capsys.readouterr().out
    assert same_bytes(load(tmp_path / "packed"), load(folder))


def test_for_bitsandbytes_experts_stay_as_they_are(mixtral: Path, tmp_path: Path) -> None:
    write_bnb(stream_model(mixtral, dtype=None), tmp_path / "bnb", dtype=torch.float32)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names(tmp_path / "bnb")
    config = json.loads((tmp_path / "bnb" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    model = load(tmp_path / "bnb")
    assert model.fourbit_report.experts == 0
    assert "model.layers.0.mlp.experts" in model.fourbit_report.left
    plain = with_transformers(mixtral)
    assert torch.equal(
        model.model.layers[0].mlp.experts.gate_up_proj, plain.model.layers[0].mlp.experts.gate_up_proj
    )


def test_matrices_are_read_one_by_one(mixtral: Path) -> None:
    streamed = stream_model(mixtral, dtype="float32")
    stacks = {name: t for name, t in streamed.tensors.items() if isinstance(t, LazyStack)}
    assert len(stacks) == 4
    for name, stack in stacks.items():
        whole = stack.read()
        assert whole.shape == stack.shape, name
        for number in range(4):
            assert torch.equal(stack.matrix(number), whole[number])


def test_factors_and_matrices_are_read_once(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although a merge writes two tensors of each matrix of gate and up, and the factors are all experts'."""
    adapted(load(mixtral)).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    quantized, checked = [], []
    quantize, check = merge.quantize_4bit, adapters.check_stored
    monkeypatch.setattr(
        merge, "quantize_4bit", lambda *a, **k: quantized.append(a[0].shape) or quantize(*a, **k)
    )
    monkeypatch.setattr(adapters, "check_stored", lambda t, where: checked.append(where) or check(t, where))
    fourbit.merge(mixtral, tmp_path / "out", adapter=tmp_path / "adapter", into="dequantized")
    assert len([shape for shape in quantized if shape == (256, 64)]) == 2 * 4  # layers, experts
    assert len(checked) == len(set(checked)) == 2 * 2 * (4 + 2)  # A and B, layers, linear ones and stacks


def test_an_adapter_for_another_number_of_experts_is_refused(mixtral: Path, tmp_path: Path) -> None:
    adapted(load(mixtral)).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    other = save(tmp_path / "other", "mixtral", num_local_experts=3)
    with pytest.raises(ModelError, match=r"experts\.(gate_up|down)_proj.* is this the adapter's base"):
        fourbit.merge(other, tmp_path / "merged", adapter=tmp_path / "adapter")


def test_factors_that_no_target_names_are_refused(mixtral: Path, tmp_path: Path) -> None:
    adapted(load(mixtral)).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if "layers.0.mlp.experts.base_layer" not in n}
    save_file(kept, file)
    with pytest.raises(ModelError, match=r"holds 1 factors for '.*', its target_parameters name 2"):
        fourbit.merge(mixtral, tmp_path / "merged", adapter=tmp_path / "adapter")
