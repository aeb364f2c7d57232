from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fourbit.nn.attention import LONGEST, NAME, ShortAttention, use_short_attention
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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [12, LONGEST + 5])
def test_a_model_gives_the_same_with_it(length: int, padded: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 200, (2, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, length - 4 :] = 0
    results = []
    for ours in (False, True):
        model = llama()
        if ours:
            assert use_short_attention(model)
            assert model.config._attn_implementation == NAME
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        logits.square().mean().backward()
        results.append((logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_a_model_with_another_attention_is_left_alone() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    assert not use_short_attention(model)
