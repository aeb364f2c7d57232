from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
)
from transformers.masking_utils import chunked_causal_mask_function

from fourbit.nn.attention import (
    NAME,
    ShortAttention,
    TiledAttention,
    attention,
    first_seen_mask,
    use_tiled_attention,
)
from tests.tiny import llama


def run(
    implementation: str, dtype: torch.dtype, heads: int, length: int, additive: bool
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, length, 16).to(torch.bfloat16).to(dtype).requires_grad_() for n in (heads, 2, 2)
    )
    grad = torch.randn(2, heads, length, 16).to(torch.bfloat16).to(dtype)
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    mask[1, :, :, length - 2 :] = False  # padding on the right
    if additive:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    if implementation == "ours":
        output = ShortAttention.apply(q, k, v, mask, 0.25)
    else:
        repeated = (x.repeat_interleave(heads // 2, dim=1) for x in (k, v))
        output = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask)
    output.backward(grad)
    return [output.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("heads", "length"), [(2, 7), (6, 33), (8, 64)])
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float32, 2e-7), (torch.bfloat16, 1e-3)])
def test_no_worse_against_fp64_than_torch(
    dtype: torch.dtype, epsilon: float, heads: int, length: int, additive: bool
) -> None:
    truth = run("torch", torch.float64, heads, length, additive)
    torch_s = run("torch", dtype, heads, length, additive)
    ours = run("ours", dtype, heads, length, additive)
    for name, true, own, other in zip(("output", "q", "k", "v"), truth, ours, torch_s, strict=True):
        own_error = (own.double() - true).norm() / true.norm()
        other_error = (other.double() - true).norm() / true.norm()
        assert own_error <= other_error + epsilon, (
            f"{name}: {own_error:.2e} against torch's {other_error:.2e}"
        )


SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
}


def inputs(kind: str, length: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a model is given, and which of its 2 x length tokens count."""
    torch.manual_seed(0)
    given = {"input_ids": torch.randint(3, 99, (2, length))}
    counted = torch.ones(2, length, dtype=torch.bool)
    if kind == "packed":
        cut = length // 3
        given["position_ids"] = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand(2, -1)
        return given, counted
    if kind == "right":
        counted[1, length - 4 :] = False
    if kind == "left":
        counted[1, :5] = False
    return given | {"attention_mask": counted.long()}, counted


def test_under_autocast_it_computes_in_autocasts_dtype() -> None:
    """Where rotary embedding has made queries and keys fp32, and values are bf16."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 16) for heads in (4, 2, 2))
    module = torch.nn.Module()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention(module, q, k, v.bfloat16(), None)
    wanted, _ = attention(module, q.bfloat16(), k.bfloat16(), v.bfloat16(), None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["full", "left", "right", "packed"])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        MistralConfig(**SIZES, sliding_window=7),
        Gemma3TextConfig(**SIZES, sliding_window=9),  # layers with a window and layers without
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_gives_the_same_with_it(config: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourbit.nn.attention._MASK_ROWS", 16)
    calls = []
    monkeypatch.setattr(
        TiledAttention, "apply", lambda *a, apply=TiledAttention.apply: calls.append(a[3]) or apply(*a)
    )
    given, counted = inputs(kind, 37)
    results = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        if ours:
            assert use_tiled_attention(model)
            assert model.config._attn_implementation == NAME
        logits = model(**given, use_cache=False).logits[counted]
        logits.square().mean().backward()
        results.append((logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    assert len(calls) == config.num_hidden_layers


def test_a_mask_of_another_form_is_left_to_sdpa() -> None:
    chunked = chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.int64))
    mask = first_seen_mask(2, 12, 12, mask_function=chunked, allow_is_causal_skip=False)
    places = torch.arange(12, dtype=torch.int32)
    assert mask is not None
    assert torch.equal(mask, (places // 5 * 5).expand(2, -1))  # chunks are of this form

    def holes(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & ((key == query) | (key % 3 == 0))

    def ahead(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key <= query + 1

    for function in (holes, ahead):
        mask = first_seen_mask(2, 12, 12, mask_function=function, allow_is_causal_skip=False)
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.shape == (2, 1, 12, 12)


def test_queries_over_a_cache_get_an_ordinary_mask() -> None:
    mask = first_seen_mask(1, 2, 9, q_offset=7, attention_mask=torch.ones(1, 9, dtype=torch.bool))
    assert mask is None or mask.ndim == 4


def test_a_model_with_another_attention_is_left_alone() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    assert not use_tiled_attention(model)
