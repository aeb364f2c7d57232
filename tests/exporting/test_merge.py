"""Merged weights are those of stock PEFT's own merge, and what cannot be merged is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fourbit import functional as F4
from fourbit.errors import ConfigError, FourBitError, ModelError
from fourbit.exporting import provenance
from fourbit.exporting.card import base_facts
from fourbit.exporting.hf import write_hf
from fourbit.exporting.merge import Quantization, merged_tensors
from fourbit.model.load import load
from fourbit.model.save import save_quantized
from tests.exporting.adapters import load_with_peft, logits, save_adapter
from tests.tiny import byte_tokenizer, llama, save_llama

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": list(LAYERS)},
    "patterns": {
        "target_modules": list(LAYERS),
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"down_proj": 3, "layers.0.self_attn.q_proj": 5},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"target_modules": list(LAYERS), "use_dora": True},
    "rsdora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj": 7}},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "replaced": {"modules_to_save": ["lm_head", "norm"]},
    "one layer": {"layers_to_transform": [1]},
}


def write_merged(base: Path, adapter: Path, output: Path, dtype: str = "float32", **options: Any) -> Path:
    write_hf(merged_tensors(base, adapter, dtype=dtype, **options), output)
    return output


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(str(file)).items()}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_pefts(form: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama(tied=False), tmp_path / "adapter", **FORMS[form])
    expected = load_with_peft(base, adapter).merge_and_unload().state_dict()
    before = read(base)

    merged = read(write_merged(base, adapter, tmp_path / "out"))
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert any(not torch.equal(weight, before[name]) for name, weight in merged.items())


def test_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(byte_tokenizer()), "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids))
    model.save_pretrained(str(tmp_path / "base"))
    byte_tokenizer().save_pretrained(str(tmp_path / "base"))
    for name, options in (("lora", {}), ("dora", {"use_dora": True})):
        adapter = save_adapter(
            GPT2LMHeadModel(model.config),
            tmp_path / name,
            target_modules=["c_attn", "c_fc"],
            fan_in_fan_out=True,
            **options,
        )
        expected = load_with_peft(tmp_path / "base", adapter).merge_and_unload().state_dict()
        merged = read(write_merged(tmp_path / "base", adapter, tmp_path / f"{name}-out"))
        for key, weight in merged.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("options", "stays_tied"),
    [
        ({}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["lm_head", "q_proj"]}, False),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    ],
)
def test_tied_weights_come_apart_only_where_the_adapter_parts_them(
    options: dict[str, Any], stays_tied: bool, tmp_path: Path
) -> None:
    """PEFT's own merge changes both of the tied two in the last cases; the adapter's forward is the truth."""
    base = save_llama(tmp_path / "base", torch.float32, tied=True)
    adapter = save_adapter(llama(tied=True), tmp_path / "adapter", **options)
    merged = merged_tensors(base, adapter, dtype="float32")
    assert merged.report.untied is not stays_tied
    write_hf(merged, tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is stays_tied
    torch.testing.assert_close(logits(model), logits(load_with_peft(base, adapter)), rtol=1e-4, atol=1e-4)


def test_dequantized_is_what_the_run_held(base: Path, adapter: Path, tmp_path: Path) -> None:
    scheme = Quantization("fp4", 128, False)
    merged = merged_tensors(base, adapter, into="dequantized", quantization=scheme, dtype="float32")
    assert merged.report.into == "dequantized"
    assert merged.report.quantization == scheme

    weights = read(base)
    a_and_b = load_file(str(adapter / "adapter_model.safetensors"))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        q = F4.quantize_4bit(weights[name], "fp4", 128, False)
        expected = F4.dequantize_4bit(q, torch.float32)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in a_and_b:
            expected += 2.0 * a_and_b[f"{key}.lora_B.weight"] @ a_and_b[f"{key}.lora_A.weight"]
        torch.testing.assert_close(merged.tensors[name].read(), expected, rtol=1e-6, atol=1e-6)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(merged.tensors[name].read(), weights[name])


def test_four_bit_base_equals_quantizing_as_the_run_did(base: Path, adapter: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    save_quantized(*load(base, compute_dtype="float32", device="cpu"), packed)
    from_packed = merged_tensors(packed, adapter, dtype="float32")
    assert from_packed.report.into == "dequantized"
    again = merged_tensors(base, adapter, into="dequantized", dtype="float32")
    assert from_packed.tensors.keys() == again.tensors.keys()
    for name, tensor in again.tensors.items():
        assert torch.equal(from_packed.tensors[name].read(), tensor.read()), name

    original = merged_tensors(packed, adapter, original=base, dtype="float32")
    assert original.report.into == "original"
    expected = merged_tensors(base, adapter, dtype="float32")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(original.tensors[name].read(), expected.tensors[name].read())


def test_bf16_is_fp32_rounded_once(base: Path, adapter: Path) -> None:
    exact = merged_tensors(base, adapter, dtype="float32").tensors
    for name, tensor in merged_tensors(base, adapter).tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.read(), exact[name].read().to(torch.bfloat16))


def test_tokens_beyond_the_embedding_get_rows_as_in_training(base: Path, tmp_path: Path) -> None:
    grown = shutil.copytree(base, tmp_path / "grown")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(str(grown))
    adapter = save_adapter(llama(tied=False), tmp_path / "adapter")
    write_merged(grown, adapter, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    trained, _ = load(grown, quant_type="none", compute_dtype="float32", device="cpu")
    assert model.config.vocab_size == len(tokenizer)
    assert torch.equal(model.lm_head.weight, trained.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, trained.model.embed_tokens.weight)


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "a IA3 adapter; only LoRA adapters can be merged"),
        ({"bias": "all"}, "bias=all: trained biases cannot be merged"),
        ({"lora_bias": True}, "an adapter with lora_bias cannot be merged"),
        ({"alora_invocation_tokens": [1]}, "an adapter with alora_invocation_tokens cannot be merged"),
        ({"init_lora_weights": "pissa_niter_4"}, "started from pissa_niter_4, which changes the base"),
        ({"use_dora": True}, "disagree about lora_magnitude_vector"),
        ({"r": 5}, "does not fit a weight"),
    ],
)
def test_adapters_that_cannot_be_merged(
    changes: dict[str, Any], message: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    edit_config(copy, **changes)
    with pytest.raises(ModelError, match=message):
        merged_tensors(base, copy)


def test_parts_without_a_place_and_shapes_that_do_not_fit(base: Path, adapter: Path, tmp_path: Path) -> None:
    wider = save_adapter(llama(tied=False, hidden=96), tmp_path / "wider")
    with pytest.raises(ModelError, match="does not fit a weight"):
        merged_tensors(base, wider)
    deeper = save_adapter(llama(tied=False, layers=3), tmp_path / "deeper")
    with pytest.raises(ModelError, match=r"'model.layers.2.*' has no place in a LlamaForCausalLM"):
        merged_tensors(base, deeper)
    strange = shutil.copytree(adapter, tmp_path / "strange")
    file = str(strange / "adapter_model.safetensors")
    save_file(
        {**load_file(file), "base_model.model.model.layers.0.mlp.down_proj.lora_C": torch.ones(2)}, file
    )
    with pytest.raises(ModelError, match="not a part of a LoRA adapter"):
        merged_tensors(base, strange)
    with pytest.raises(ModelError, match="no adapter here"):
        merged_tensors(base, tmp_path)


def record_training(adapter: Path, base: Path) -> None:
    step = provenance.make_step(
        "train", [provenance.describe("base", base)], {"model": {"quant_type": "nf4"}}
    )
    provenance.write(adapter, [step])


def test_the_wrong_base_is_refused_unless_allowed(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    record_training(copy, base)
    assert merged_tensors(base, copy).report.base_verified is True
    assert merged_tensors(base, adapter).report.base_verified is None

    other = save_llama(tmp_path / "other", torch.bfloat16, tied=False)
    with pytest.raises(ModelError, match=r"not the base that .* was trained on .* say --any-base"):
        merged_tensors(other, copy)
    allowed = merged_tensors(other, copy, any_base=True)
    assert allowed.report.base_verified is False
    assert allowed.chain[-1].settings["any_base"] is True


def test_merging_twice_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    once = write_merged(base, adapter, tmp_path / "once")
    with pytest.raises(ModelError, match="is merged into it already"):
        merged_tensors(once, adapter)
    other = save_adapter(llama(tied=False), tmp_path / "other", seed=2)
    twice = merged_tensors(once, other)
    assert [step.kind for step in twice.chain] == ["merge", "merge"]


def test_settings_that_contradict(base: Path, adapter: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    save_quantized(*load(base, device="cpu"), packed)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"base": packed, "into": "original"}, "the base holds 4-bit weights"),
        ({"into": "dequantized", "quantization": Quantization("none")}, "trained on unquantized weights"),
        ({"dtype": "float8"}, "must be one of bfloat16, float16, float32"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            merged_tensors(options.pop("base", base), adapter, **options)


def test_values_that_leave_the_dtype(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama(tied=False), tmp_path / "adapter", lora_alpha=10_000_000)
    merged = merged_tensors(base, adapter, dtype="float16")
    with pytest.raises(FourBitError, match="not finite in float16"):
        write_hf(merged, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_gguf_file_is_a_base(smollm2: Path, tmp_path: Path) -> None:
    """Its weights come in Hugging Face's order, its licence from its metadata."""
    a = torch.randn(8, 576, generator=torch.Generator().manual_seed(0))
    b = torch.randn(192, 8, generator=torch.Generator().manual_seed(1))
    key = "base_model.model.model.layers.3.self_attn.k_proj"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    parts = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(parts, str(adapter / "adapter_model.safetensors"))
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 4}))

    merged = merged_tensors(smollm2, adapter, dtype="float32")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(smollm2)).tensors}
    entry = stored["blk.3.attn_k.weight"]
    key_weight = torch.tensor(gguf.dequantize(entry.data, entry.tensor_type))
    expected = key_weight.view(3, 32, 2, 576).transpose(1, 2).reshape(192, 576) + 0.5 * b @ a
    found = merged.tensors["model.layers.3.self_attn.k_proj.weight"]
    assert found.shape == (192, 576)
    torch.testing.assert_close(found.read(), expected, rtol=1e-6, atol=1e-6)
    assert "lm_head.weight" not in merged.tensors
    assert merged.config.tie_word_embeddings
    assert base_facts(merged.base) == {"license": "apache-2.0"}


def test_an_incomplete_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    weights = read(copy)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, str(copy / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 'model.layers.1.mlp.up_proj.weight'"):
        merged_tensors(copy, adapter)
