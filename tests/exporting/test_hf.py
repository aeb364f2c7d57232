"""What is written is a model folder that stock transformers loads, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourbit.errors import ConfigError, ModelError
from fourbit.exporting import provenance
from fourbit.exporting.hf import write_hf
from fourbit.exporting.merge import merged_tensors
from fourbit.exporting.shards import ShardWriter
from fourbit.exporting.streamed import stream_model
from tests.tiny import CHATML, save_llama


def test_shards_of_any_size_hold_the_same_tensors(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merged_tensors(base, adapter)
    expected = {name: tensor.read() for name, tensor in merged.tensors.items()}
    for shard_bytes, files in ((1_000_000_000, 1), (60_000, 5), (1, len(expected))):
        folder = tmp_path / str(shard_bytes)
        size = write_hf(merged, folder, shard_bytes=shard_bytes)
        found = sorted(folder.glob("*.safetensors"))
        assert len(found) == files
        assert size == sum(t.nbytes for t in expected.values())
        assert (folder / "model.safetensors.index.json").exists() is (files > 1)
        state = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_all_that_belongs_to_a_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: someone/else\n---\n# a base\n")
    write_hf(merged_tensors(base, adapter), tmp_path / "out", datasets=["me/tickets"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert "quantization_config" not in config
    assert (tmp_path / "out" / "generation_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer.chat_template == CHATML
    assert [step.kind for step in provenance.read(tmp_path / "out")] == ["merge"]
    card = metadata_load(tmp_path / "out" / "README.md")
    assert (card["license"], card["library_name"]) == ("apache-2.0", "transformers")
    assert card["datasets"] == ["me/tickets"]
    assert "base_model" not in card  # the base of the base is not the base
    assert "vllm serve out" in (tmp_path / "out" / "README.md").read_text()


def test_a_quantized_base_is_written_without_its_quantization(base: Path, tmp_path: Path) -> None:
    from fourbit.model.load import load
    from fourbit.model.save import save_quantized

    model, tokenizer = load(base, compute_dtype="float32", device="cpu")
    save_quantized(model, tokenizer, tmp_path / "packed")
    write_hf(stream_model(tmp_path / "packed", "float32"), tmp_path / "out")
    restored = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    expected = layer.dequantize(torch.float32)  # type: ignore[operator]
    assert torch.equal(restored.model.layers[0].mlp.up_proj.weight, expected)


def test_a_failure_leaves_nothing_and_what_was_there_stays(base: Path, adapter: Path, tmp_path: Path) -> None:
    cut = save_llama(tmp_path / "cut", torch.float32, tied=False)
    merged = merged_tensors(cut, adapter)
    out = tmp_path / "out"
    write_hf(merged, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        write_hf(merged, out)
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        write_hf(merged, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"cut", "out"}
    with pytest.raises(ConfigError, match=r"would replace .* which is read"):
        write_hf(merged, cut, overwrite=True)
    with pytest.raises(ConfigError, match=r"would replace .* which is read"):
        write_hf(merged, tmp_path, overwrite=True)


def test_values_stand_aligned_whatever_comes(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(13, dtype=torch.uint8),
        "half": torch.arange(5, dtype=torch.bfloat16),
        "single": torch.arange(3, dtype=torch.float32),
        "even": torch.arange(16, dtype=torch.float32).reshape(4, 4),
        "scalar": torch.tensor(2.5),
        "name of two ünicode wörds": torch.zeros(1, 7, dtype=torch.int64),
    }
    writer = ShardWriter(tmp_path, tensors)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0
