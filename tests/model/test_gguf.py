"""The real model: SmolLM2-135M-Instruct out of a GGUF file."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

import fourbit
from fourbit import functional as F4
from fourbit.errors import ModelError
from fourbit.model.base import make_skeleton
from fourbit.model.formats import gguf as gguf_format
from fourbit.nn.linear import Linear4bit


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> tuple[torch.nn.Module, object]:
    return fourbit.load(smollm2, compute_dtype="bfloat16")


def test_shapes_counts_and_ties(loaded: tuple) -> None:
    model, tokenizer = loaded
    report = model.fourbit_report
    assert report.converted == 210
    assert report.parameters == 134_515_008
    assert report.bits_per_weight == pytest.approx(4.127, abs=1e-3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == 49_152
    assert tokenizer.pad_token_id is not None
    assert "<|im_start|>" in tokenizer.chat_template


def test_weights_are_the_files_own_with_the_rotary_order_undone(loaded: tuple, smollm2: Path) -> None:
    model, _ = loaded
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(smollm2)).tensors}

    def dense(name: str) -> torch.Tensor:
        return torch.tensor(gguf.dequantize(stored[name].data, stored[name].tensor_type))

    layer = model.model.layers[7]
    down = F4.quantize_4bit(dense("blk.7.ffn_down.weight"), double_quant=True)
    assert torch.equal(layer.mlp.down_proj.weight, down.codes)
    assert torch.equal(layer.mlp.down_proj.weight_absmax, down.absmax)
    query = dense("blk.7.attn_q.weight").view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(layer.self_attn.q_proj.weight, F4.quantize_4bit(query).codes)


def test_it_still_knows_the_capital_of_france(loaded: tuple) -> None:
    model, tokenizer = loaded
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0][inputs["input_ids"].shape[1] :])


def test_packed_parameters_survive_casts(loaded: tuple) -> None:
    layer = loaded[0].model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit)
    before = layer.weight.clone()
    assert torch.equal(layer.half().weight, before)
    assert layer.weight.dtype == torch.uint8


def test_a_truncated_file_is_one_line(smollm2: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    with smollm2.open("rb") as source:
        short.write_bytes(source.read(20_000_000))
    with pytest.raises(ModelError, match=r"short\.gguf.*cannot be read as GGUF.*is the file complete\?"):
        fourbit.load(short)


def test_the_peak_of_a_load_is_what_stays_plus_one_tensor_plus_300_mb(smollm2: Path) -> None:
    script = (
        "import sys, torch, fourbit, fourbit.model.load\n"
        "from fourbit.memory.measure import peak_resident_bytes as peak\n"
        "before = peak()\n"
        "model, _ = fourbit.load(sys.argv[1], compute_dtype='bfloat16')\n"
        "print(peak() - before, model.fourbit_report.weight_bytes)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(smollm2)], capture_output=True, text=True, check=True
    )
    grown, stays = map(int, done.stdout.split())
    # The one tensor: the embedding, Q8_0 in the file, fp32 when read.
    assert grown <= stays + 49_152 * 576 * 4 + 300e6


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q6_K", "Q8_0"])
def test_a_tensor_is_restored_in_pieces_as_gguf_restores_it_whole(kind, tmp_path, monkeypatch):
    stored_type = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[stored_type]
    rows, columns = 21, 2 * block
    generator = np.random.default_rng(0)
    if kind in ("F32", "F16"):
        stored = generator.standard_normal((rows, columns)).astype(
            {"F32": np.float32, "F16": np.float16}[kind]
        )
    else:
        stored = generator.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    entry = SimpleNamespace(
        data=stored, tensor_type=stored_type, n_elements=rows * columns, shape=np.array([columns, rows])
    )
    monkeypatch.setattr(gguf_format, "_AT_ONCE", 4 * columns)
    restored = gguf_format._values(entry)
    assert restored.tobytes() == gguf.dequantize(stored, stored_type).astype(np.float32).tobytes()
    assert restored.shape == (rows, columns)
    assert restored.flags.writeable
    vector = SimpleNamespace(
        data=stored[0], tensor_type=stored_type, n_elements=columns, shape=np.array([columns])
    )
    assert gguf_format._values(vector).tobytes() == restored[0].tobytes()


def test_a_tensor_is_not_held_twice_as_it_is_read(smollm2):
    skeleton = make_skeleton(smollm2, gguf_format.read_config(smollm2), False)
    tensor = gguf_format.open_file(smollm2, skeleton)["model.embed_tokens.weight"]
    tracemalloc.start()  # numpy tells it of its arrays
    values = tensor.read()
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values.nbytes <= highest < 1.3 * values.nbytes
