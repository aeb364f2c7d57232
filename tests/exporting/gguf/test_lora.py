"""Adapters as LoRA GGUF files, applied by llama.cpp to the base's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fourbit.errors import ModelError
from fourbit.exporting.gguf.llama_cpp import LlamaCppReader
from fourbit.exporting.gguf.lora import write_lora_gguf
from fourbit.exporting.gguf.write import write_gguf
from tests.exporting.gguf import models

# PEFT asks transformers in words that transformers has deprecated since.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXT = "<|im_start|>user\nthe quick brown fox jumps over 12345 lazy dogs<|im_end|>\n"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(name: str, folder: Path, **settings: Any) -> PeftModel:
    """A model with an adapter whose B is not zero, saved as PEFT saves it."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(models.model(name, 500), LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"lora_alpha": 3, "use_rslora": True}),
        (
            "llama",
            {
                "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
                "alpha_pattern": {"k_proj": 32, r"layers\.0\.self_attn\.v_proj": 1},
            },
        ),
        ("llama-untied", {"target_modules": ["q_proj", "lm_head"]}),
        ("qwen2", {"use_rslora": True}),
        ("gemma2", {}),
    ],
)
def test_llama_cpp_applies_it_as_peft_does(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(name, tmp_path / "adapter", **settings)
    base = model.get_base_model()
    tokenizer = models.byte_level()
    file = write_lora_gguf(tmp_path / "adapter", base.config, tmp_path / "adapter.gguf")
    plain = models.model(name, 500)
    whole = write_gguf(models.lazy(plain), plain.config, tokenizer, tmp_path / "base.gguf", "F32")

    ids = tokenizer.encode(TEXT)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        without = torch.log_softmax(plain(torch.tensor([ids])).logits[0].double(), -1)
    with LlamaCppReader(whole, lora=file, context=128, threads=1, slots=1) as reader:
        scores = reader.score(ids, [True] * len(ids))
    gaps = [abs(s.log_probability - expected[i, ids[i + 1]].item()) for i, s in enumerate(scores)]
    assert max(gaps) < (3e-3 if name == "gemma2" else 5e-5)
    assert (expected - without).abs().max() > 0.1, "the adapter matters"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, r"whole trained modules \(modules_to_save\)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "not part of a linear layer's LoRA"),
        ({"bias": "lora_only"}, "it trained biases"),
        ({"trainable_token_indices": [1, 2]}, "trained token embeddings"),
    ],
)
def test_what_a_lora_file_cannot_hold_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    name = "llama-biases" if "bias" in settings else "llama-untied"
    model = adapted(name, tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match=rf"cannot be a LoRA GGUF: .*{reason}.*merge it into the base"):
        write_lora_gguf(tmp_path / "adapter", model.get_base_model().config, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    config = adapted("llama-untied", tmp_path / "adapter", target_modules=["lm_head"]).get_base_model().config
    config.tie_word_embeddings = True
    with pytest.raises(ModelError, match="it adapts lm_head, which is the embedding"):
        write_lora_gguf(tmp_path / "adapter", config, tmp_path / "x.gguf")


def test_an_adapter_of_a_changed_base_is_refused(tmp_path: Path) -> None:
    config = adapted("llama", tmp_path / "adapter").get_base_model().config
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"init_lora_weights": "pissa_niter_4"}
    file.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ModelError, match="initialized by pissa_niter_4, which changed the base's weights"):
        write_lora_gguf(tmp_path / "adapter", config, tmp_path / "x.gguf")


def test_damaged_adapters_are_one_line(tmp_path: Path) -> None:
    config = models.config("llama", 500)
    with pytest.raises(ModelError, match=r"no adapter here \(adapter_config\.json is missing\)"):
        write_lora_gguf(tmp_path, config, tmp_path / "x.gguf")
    adapted("llama", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    half = {
        key: value for key, value in tensors.items() if not key.endswith("0.self_attn.q_proj.lora_B.weight")
    }
    save_file(half, file)
    with pytest.raises(ModelError, match=r"0\.self_attn\.q_proj' does not fit its settings, .* B missing"):
        write_lora_gguf(tmp_path / "adapter", config, tmp_path / "x.gguf")
    file.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: cannot be read"):
        write_lora_gguf(tmp_path / "adapter", config, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"intermediate_size": 96}, r"'model\.layers\.0\.mlp\.\w+' of \[.*\], which is \[.*\] there"),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\.\S+' of \[.*\], which is not there"),
    ],
)
def test_an_adapter_of_another_base_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    adapted("llama", tmp_path / "adapter")
    with pytest.raises(ModelError, match=rf"does not fit this base: it adapts {reason}"):
        write_lora_gguf(tmp_path / "adapter", models.config("llama", 500, **changes), tmp_path / "x.gguf")


def test_llama_cpp_refuses_an_adapter_of_another_base(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path / "adapter")
    file = write_lora_gguf(tmp_path / "adapter", model.get_base_model().config, tmp_path / "adapter.gguf")
    other = models.model("qwen2", 500)
    whole = write_gguf(models.lazy(other), other.config, models.byte_level(), tmp_path / "base.gguf", "F32")
    with pytest.raises(ModelError, match=r"base\.gguf with .*adapter\.gguf: llama\.cpp cannot load it"):
        LlamaCppReader(whole, lora=file, context=64, threads=1, slots=1)
