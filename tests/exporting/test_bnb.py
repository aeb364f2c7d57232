"""A re-quantized merge is a bitsandbytes checkpoint of the merged weights, and its loss is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fourbit import functional as F4
from fourbit.errors import ModelError
from fourbit.exporting import provenance
from fourbit.exporting.bnb import write_bnb
from fourbit.exporting.merge import merged_tensors
from fourbit.model.load import load
from fourbit.nn.linear import Linear4bit


@pytest.mark.parametrize(
    ("quant_type", "block_size", "double_quant"), [("nf4", 64, True), ("fp4", 32, False)]
)
def test_codes_are_those_of_the_merged_weights(
    quant_type: str, block_size: int, double_quant: bool, base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = merged_tensors(base, adapter, dtype=None)
    result = write_bnb(
        merged,
        tmp_path / "out",
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        shard_bytes=20_000,
    )
    model, _ = load(tmp_path / "out", device="cpu")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert {f"{name}.weight" for name in layers} == result.weight_error.keys()
    for name, layer in layers.items():
        weight = merged.tensors[f"{name}.weight"].read()
        q = F4.quantize_4bit(weight, quant_type, block_size, double_quant)
        assert torch.equal(layer.quantized().codes, q.codes)
        error = (F4.dequantize_4bit(q, torch.float32) - weight).norm() / weight.norm()
        assert result.weight_error[f"{name}.weight"] == pytest.approx(error.item(), rel=1e-5)
    assert result.worst[1] == max(result.weight_error.values())
    assert 0.05 < result.mean_error < 0.2
    embedding = model.get_input_embeddings().weight
    assert torch.equal(
        embedding.float(), merged.tensors["model.embed_tokens.weight"].read().bfloat16().float()
    )
    step = provenance.read(tmp_path / "out")[-1]
    assert (step.kind, step.effect["mean_weight_error"]) == ("export", result.mean_error)


def test_bitsandbytes_itself_reads_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    import bitsandbytes

    merged = merged_tensors(base, adapter, dtype=None)
    write_bnb(merged, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    layer = theirs.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    restored = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    ours, _ = load(tmp_path / "out", device="cpu", compute_dtype="float32")
    expected = ours.get_submodule("model.layers.0.self_attn.q_proj").dequantize(restored.dtype)  # type: ignore[operator]
    torch.testing.assert_close(restored, expected, rtol=1e-6, atol=1e-7)


def test_what_bitsandbytes_cannot_hold(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merged_tensors(base, adapter, dtype=None)
    with pytest.raises(ModelError, match="int4 cannot be saved"):
        write_bnb(merged, tmp_path / "out", quant_type="int4")
    assert not (tmp_path / "out").exists()
