"""Every common family, as a tiny seeded model: from loading to the merge.

Six families run in the fast suite, all of them with the slow tests. The README names them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import fourbit
from fourbit.data.batch import collate
from fourbit.data.pack import collate_packed
from fourbit.data.render import Example
from fourbit.errors import ConfigError, ModelError
from fourbit.memory.activations import checkpoint_activations
from fourbit.model.adapters import load_adapter
from fourbit.nn.attention import use_tiled_attention
from fourbit.nn.fused import fuse
from fourbit.nn.linear import Linear4bit, is_plain, unpacked_linear
from fourbit.nn.loss import causal_lm_loss
from fourbit.nn.packing import keeps_rows_apart
from tests.tiny import byte_tokenizer

COMMON = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2,
    "bos_token_id": 1, "attention_dropout": 0.0,
}  # fmt: skip
_HEAD = {"head_dim": 16}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
#: Name in the README: what the config needs beside COMMON, and whether rows can be laid end to end (`apart`).
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"type": "llama"},
    "Mistral": {"type": "mistral", "sliding_window": 16, **_HEAD},
    "Qwen 2": {"type": "qwen2"},
    "Gemma 2": {"type": "gemma2", "query_pre_attn_scalar": 16, **_HEAD},
    "Phi 3": {"type": "phi3"},
    "Falcon": {"type": "falcon", "num_kv_heads": 2, "new_decoder_architecture": True, "apart": False},
    "Falcon (old)": {"type": "falcon", "multi_query": True, "bias": False, "apart": False},
    "Qwen 3": {"type": "qwen3", **_HEAD},
    "Gemma": {"type": "gemma", **_HEAD},
    "Gemma 3": {"type": "gemma3_text", "query_pre_attn_scalar": 16, **_HEAD},
    "Phi": {"type": "phi"},
    "GPT-2": {
        "type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "GPT-NeoX": {"type": "gpt_neox"},
    "OPT": {"type": "opt", "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0, "apart": False},
    "BLOOM": {"type": "bloom", "n_layer": 2, "n_head": 4, "apart": False},
    "StableLM": {"type": "stablelm"},
    "OLMo": {"type": "olmo"},
    "OLMo 2": {"type": "olmo2"},
    "Granite": {"type": "granite"},
    "Cohere": {"type": "cohere"},
    "Cohere 2": {"type": "cohere2", **_HEAD},
    "SmolLM 3": {"type": "smollm3"},
    "StarCoder 2": {"type": "starcoder2", "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "GPT-J": {"type": "gptj", "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "n_positions": 256},
    "MPT": {"type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "apart": False},
    "GLM 4": {"type": "glm4", **_HEAD},
    "Nemotron": {"type": "nemotron"},
    "EXAONE 4": {"type": "exaone4"},
    "ERNIE 4.5": {"type": "ernie4_5"},
    "Hunyuan": {"type": "hunyuan_v1_dense", **_HEAD},
    "Mixtral": {"type": "mixtral", "num_local_experts": 4},
    "Qwen 3 MoE": {"type": "qwen3_moe", "num_experts": 4, **_EXPERTS, **_HEAD},
    "Qwen 2 MoE": {
        "type": "qwen2_moe", "num_experts": 4, "shared_expert_intermediate_size": 48, **_EXPERTS,
    },
    "OLMoE": {"type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "GLM 4 MoE": {"type": "glm4_moe", "n_routed_experts": 4, **_EXPERTS, **_HEAD},
    "DeepSeek V3": {
        "type": "deepseek_v3", "n_routed_experts": 4, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4, **_EXPERTS,
    },
    "GPT-OSS": {"type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "apart": False, **_HEAD},
}  # fmt: skip
FAST = ("Llama", "Mistral", "Qwen 2", "Gemma 2", "Phi 3", "Falcon", "Mixtral")
IDS = torch.arange(3, 30)[None]


def save(folder: Path, kind: str, **settings: Any) -> Path:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=len(byte_tokenizer()), **{**COMMON, **settings})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(str(folder))
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def load(folder: Path) -> Any:
    return fourbit.load(folder, compute_dtype="float32", device="cpu")[0]


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_from_loading_to_the_merge(family: str, tmp_path: Path) -> None:
    settings = dict(FAMILIES[family])
    kind, apart = settings.pop("type"), settings.pop("apart", True)
    folder = save(tmp_path / "model", kind, **settings)
    base = load(folder)
    heads = {id(base.get_output_embeddings())}
    # Every linear layer but the head. (Routers are not of this class, and stay as they are.)
    left = unpacked_linear(base)
    assert [name for name in left if id(base.get_submodule(name)) not in heads] == []
    packed = [module for module in base.modules() if isinstance(module, Linear4bit)]
    assert len(packed) >= 8
    model = fourbit.add_lora(base, r=4, alpha=8, dropout=0.0, seed=0)
    rows = [
        Example([3 + (7 * n + k) % 200 for k in range(length)], [True] * length, n, "r", 0)
        for n, length in enumerate((9, 17))
    ]
    batch = collate(rows, 0)
    plain, _ = causal_lm_loss(model, batch)
    use_tiled_attention(base)
    fuse(base)
    fused, count = causal_lm_loss(model, batch)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    assert keeps_rows_apart(model, 0, torch.device("cpu")) == apart
    if apart:
        assert causal_lm_loss(model, collate_packed(rows, 0))[0].item() == pytest.approx(
            plain.item(), rel=1e-5
        )
    checkpoint_activations(base)
    model.train()
    optimizer = fourbit.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss, _ = causal_lm_loss(model, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert causal_lm_loss(model, batch)[0].item() < 0.998 * plain.item()
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    fourbit.save_quantized(load(folder), byte_tokenizer(), tmp_path / "packed")
    again = load_adapter(load(tmp_path / "packed"), tmp_path / "adapter")
    wanted = logits(model)
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(again.merge_and_unload()), wanted, rtol=1e-4, atol=1e-4)


def test_layers_that_cannot_be_adapted_are_one_line(tmp_path: Path) -> None:
    base = load(save(tmp_path / "model", "mamba"))
    with pytest.raises(ConfigError, match=r"lora\.target_modules: .*incompatible with Mamba-based models"):
        fourbit.add_lora(base, r=4)


def test_a_model_without_a_layer_to_pack_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", num_hidden_layers=0)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM has no linear layer .* model\.quant_type to none"
    ):
        load(folder)


class Renamed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Wanting(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


def test_a_class_is_a_linear_layer_by_what_it_computes() -> None:
    assert is_plain(nn.Linear(3, 2))
    assert is_plain(Renamed(3, 2))
    assert not is_plain(Scaled(3, 2))
    assert not is_plain(Wanting(3, 2))
    assert not is_plain(nn.MultiheadAttention(8, 2).out_proj)  # attention reads its weight itself
    with torch.device("meta"):
        assert is_plain(Renamed(5, 5))


def test_the_readme_names_the_families() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    pattern = r"^Families that are tested from loading to the merge: (.+?)\.$"
    (named,) = re.findall(pattern, readme, re.MULTILINE | re.DOTALL)
    assert " ".join(named.split()) == ", ".join(FAMILIES)
