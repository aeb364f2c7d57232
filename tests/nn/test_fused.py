"""Fused norms, gated MLPs, rotary embeddings: what matches, what is left, that a model computes the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

import fourbit
import fourbit.nn.rotary
from fourbit.memory.activations import checkpoint_activations
from fourbit.nn.copies import own_copy
from fourbit.nn.fused import fuse, unfuse
from fourbit.nn.linear import Linear4bit
from fourbit.nn.norm import rms_norm, sum_norm
from fourbit.nn.remake import remake_of
from tests.tiny import llama

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
}

ALL = {"decoder layers": 2, "RMS norms": 5, "gated MLPs": 2, "rotary embeddings": 2}


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss  # a layer that caches runs its own code
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("config", "matched"),
    [
        (LlamaConfig(**SIZES), ALL),
        (
            Qwen3Config(**SIZES),
            {**ALL, "RMS norms": 9},
        ),  # queries and keys have norms of their own
        (
            Gemma2Config(**SIZES),
            {"RMS norms": 9, "gated MLPs": 2, "rotary embeddings": 2},
        ),  # 1 + weight, GELU by tanh, norms behind the parts too
        (CohereConfig(**SIZES), {"gated MLPs": 2}),  # neighbours are pairs
        (Phi3Config(**SIZES), {"RMS norms": 5, "rotary embeddings": 2}),  # gate and up are one matrix
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
def test_the_same_loss_and_gradients(config: Any, matched: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:  # fresh ones are all 0 or 1
            nn.init.normal_(parameter, std=0.5)
            parameter.requires_grad_(False)
    before = loss_and_gradients(model)
    assert dict(fuse(model).matched) == matched
    after = loss_and_gradients(model)
    torch.testing.assert_close(after, before, rtol=2e-5, atol=1e-6)
    assert not fuse(model).matched  # they are already
    unfuse(model)
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(model)[1], before[1], strict=True))


def test_residual_sums_with_a_factor_are_left() -> None:
    config = GraniteConfig(**SIZES, residual_multiplier=0.5)
    report = fuse(AutoModelForCausalLM.from_config(config))
    assert report.left == {"GraniteDecoderLayer": "its residual sums are others"}


class Curious(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
        assert self.mlp.gate_proj.in_features == hidden_states.shape[-1]
        return super().forward(hidden_states, **named)


def test_a_layer_that_looks_into_its_parts_is_left() -> None:
    report = fuse(nn.ModuleList([Curious(LlamaConfig(**SIZES), 0)]))
    assert report.left == {"Curious": "its residual sums are others"}


def test_a_layer_whose_norm_is_watched_runs_its_own_code() -> None:
    model = llama().requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    fuse(model)
    seen: list[Tensor] = []
    unwatched = loss_and_gradients(model)
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *given: seen.append(given[2]))
    watched = loss_and_gradients(model)
    assert len(seen) == 1
    torch.testing.assert_close(watched, unwatched, rtol=2e-5, atol=1e-6)


def test_a_residual_stream_of_another_dtype() -> None:
    model = llama().requires_grad_(False).bfloat16()
    model.model.embed_tokens.float().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        before = loss_and_gradients(model)
        assert fuse(model).matched["decoder layers"] == 2
        after = loss_and_gradients(model)
    assert after[1][0].dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-3)


def test_copies_are_handed_out_once_and_only_of_what_was_noted() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    total, y = sum_norm(x, x.detach(), torch.ones(8), 1e-6, 3)
    copies = [own_copy(y), own_copy(y)]
    assert own_copy(y) is y
    assert all(c is not y and c.data_ptr() == y.data_ptr() and remake_of(c) is not None for c in copies)
    (2 * y + 3 * copies[0]).sum().backward()  # nothing comes back from the other copy, nor past the norm
    found, x.grad = x.grad, None
    (5 * rms_norm(x + x.detach(), torch.ones(8), 1e-6)).sum().backward()
    torch.testing.assert_close(found, x.grad)
    x.grad = None
    total, y = sum_norm(x, None, torch.ones(8), 1e-6, 2)
    y = y.mul_(2)
    assert own_copy(y) is y
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 8))


def test_a_norm_that_trains_runs_its_own_code() -> None:
    model = llama()
    before = loss_and_gradients(model)
    fuse(model)
    after = loss_and_gradients(model)
    assert len(after[1]) == len(before[1])
    torch.testing.assert_close(after, before, rtol=2e-5, atol=1e-6)


class Doubled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class CenteredRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


def test_what_computes_something_else_is_left_with_the_reason() -> None:
    config = LlamaConfig(**SIZES)
    relu = LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu"))
    report = fuse(nn.ModuleList([Doubled(config), CenteredRMSNorm(48)]))
    assert not report.matched
    assert report.line() == (
        "fused: nothing; left Doubled: it computes more than that; left CenteredRMSNorm: it is another norm"
    )
    assert "activation" in fuse(nn.ModuleList([relu])).left["LlamaMLP"]


def test_a_rotary_embedding_of_part_of_a_head_is_left() -> None:
    config = GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, rotary_pct=0.5)
    report = fuse(AutoModelForCausalLM.from_config(config))
    assert report.left == {"GPTNeoXAttention": "it turns a part of each head only"}


def test_a_rotary_embedding_that_takes_other_shapes_is_left() -> None:
    """GPT-OSS has cosines for half of a head's width."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 32, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **experts, num_key_value_heads=2))
    assert "its rotary embedding is another" in fuse(model).line()


def test_a_rotary_embedding_runs_in_its_model_only_and_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = llama(), llama()
    fuse(model)
    called: list[tuple[int, ...]] = []
    own = fourbit.nn.rotary.rotary
    monkeypatch.setattr(
        fourbit.nn.rotary, "rotary", lambda x, *a: called.append(tuple(x.shape)) or own(x, *a)
    )
    ids = torch.randint(3, 90, (2, 11))
    expected = other(input_ids=ids).logits
    assert not called  # transformers' module is as it was
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=2e-5, atol=1e-6)
    assert len(called) == 2 * model.config.num_hidden_layers
    attention = model.model.layers[0].self_attn
    queries, half = torch.randn(2, 2, 11, 8), torch.randn(1, 11, 4)
    turn = attention.forward.__func__.__globals__["apply_rotary_pos_emb"]
    del called[:]
    with pytest.raises(RuntimeError, match="must match"):  # theirs refuses, as it would have
        turn(queries, queries, half, half)
    angles = torch.randn(1, 11, 8, requires_grad=True)
    turn(queries, queries, angles, angles)[0].sum().backward()
    assert angles.grad is not None
    odd = torch.randn(2, 2, 11, 6)[..., :5]
    turn(odd, odd, angles[..., :5].detach(), angles[..., :5].detach())
    turn(queries.transpose(1, 2), queries.transpose(1, 2), torch.randn(1, 11, 8), torch.randn(1, 11, 8), 2)
    assert not called


def test_what_another_library_wrapped_is_left() -> None:
    model = llama()
    model.model.norm.forward = model.model.norm.forward
    assert fuse(model).matched["RMS norms"] == 4


def adapted_llama(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A Llama with 4-bit layers, and the same with an adapter that does something, in training mode."""
    model = llama().to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Linear4bit.from_linear(module))
    model.requires_grad_(False)
    adapted = fourbit.add_lora(model, r=4, dropout=0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model, adapted.train()


def test_with_adapters_on_4_bits_copies_and_in_training_mode() -> None:
    model, adapted = adapted_llama()
    before = loss_and_gradients(adapted)
    assert fuse(model).matched == {**ALL, "LoRA layers": 14}
    assert model.model.layers[0].mlp.training
    torch.testing.assert_close(loss_and_gradients(adapted), before, rtol=2e-5, atol=1e-6)
    twin = copy.deepcopy(adapted)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert loss_and_gradients(twin)[0] != loss_and_gradients(adapted)[0]
    torch.testing.assert_close(loss_and_gradients(adapted), before, rtol=2e-5, atol=1e-6)


def kept_bytes(model: nn.Module) -> int:
    """Bytes that a forward pass keeps for backward, each memory counted once, parameters not at all."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 90, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(kept.values())


def test_fused_layers_are_checkpointed() -> None:
    model, adapted = adapted_llama()
    fuse(model)
    kept, wanted = kept_bytes(adapted), loss_and_gradients(adapted)
    checkpoint_activations(model)
    assert kept_bytes(adapted) < 0.4 * kept
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(adapted)[1], wanted[1], strict=True))


def test_what_can_be_made_again_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapted = adapted_llama(torch.bfloat16)
    plain = kept_bytes(adapted)
    fuse(model)
    fused, again = kept_bytes(adapted), loss_and_gradients(adapted)
    monkeypatch.setattr("fourbit.nn.lora.remake_of", lambda _: None)
    assert fused < 0.8 * kept_bytes(adapted)
    assert fused < 0.6 * plain
    kept = loss_and_gradients(adapted)
    assert all(torch.equal(a, b) for a, b in zip(again[1], kept[1], strict=True))


def test_a_result_changed_in_place_is_not_made_again() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), 1e-6)
    note = remake_of(y)
    assert note is not None
    assert torch.equal(note.function(*note.inputs), y)
    y.mul_(2)
    assert remake_of(y) is None
    assert remake_of(y + 0) is None
    with torch.no_grad():
        assert remake_of(rms_norm(x, torch.ones(8), 1e-6)) is None
