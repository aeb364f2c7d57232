"""A model of a billion parameters passes through two gigabytes of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fourbit.exporting.shards import ShardWriter
from tests.tiny import byte_tokenizer

_LIMIT = 2_000_000_000
_SCRIPT = """
import json, sys
import fourbit
from fourbit.memory.measure import peak_resident_bytes

base, adapter, merged, packed = sys.argv[1:]
result = fourbit.merge(base, merged, adapter=adapter, into="dequantized")
after_merge = peak_resident_bytes()
export = fourbit.export(base, packed, to="bnb", adapter=adapter)
json.dump([result.bytes, after_merge, export.bytes, peak_resident_bytes()], sys.stdout)
"""


@pytest.mark.slow
def test_one_billion_parameters_within_two_gigabytes(tmp_path: Path) -> None:
    """The shape of Llama 3.2 1B, its embedding of 128,256 rows tied to the head."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    base = tmp_path / "base"
    base.mkdir()
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    parameters = sum(shape.numel() for shape in shapes.values())
    assert parameters > 1_200_000_000
    writer, generator = ShardWriter(base, shapes, 1_000_000_000), torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator).mul_(0.02).to(torch.bfloat16)
    for name, shape in shapes.items():
        writer.add(name, noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape))
    writer.finish()
    config.save_pretrained(str(base))
    byte_tokenizer().save_pretrained(str(base))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    parts: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            parts[f"{key}.lora_A.weight"] = torch.randn(16, shape[1], generator=generator)
            parts[f"{key}.lora_B.weight"] = torch.randn(shape[0], 16, generator=generator)
    save_file(parts, str(adapter / "adapter_model.safetensors"))
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))

    words = [str(base), str(adapter), str(tmp_path / "merged"), str(tmp_path / "packed")]
    done = subprocess.run([sys.executable, "-c", _SCRIPT, *words], capture_output=True, text=True, check=True)
    merged_bytes, merge_peak, packed_bytes, export_peak = json.loads(done.stdout)
    assert merged_bytes == 2 * parameters
    assert 0.5 * parameters < packed_bytes < parameters
    assert merge_peak < _LIMIT
    assert export_peak < _LIMIT
