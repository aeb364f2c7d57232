"""Attention over short sequences for training on a CPU, where torch's kernel is at its worst.

    P = softmax(scale * Q K^T + mask),   O = P V

torch's fused CPU kernel takes ten times as long for 16 x 41 tokens as the plain products do, most of
it in backward. Here scores are formed in fp32, the other products in the input's dtype, and backward
makes P again from q, k, v, so that nothing of size T x S is kept. Grouped queries read each key-value
head once: the G query heads of a group stand below one another in one product.

Registered with transformers as attention "fourbit"; longer sequences, and what is not training, go to
its own `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fourbit"
#: Beyond so many tokens torch's fused kernel is the faster one (docs/log.md).
LONGEST = 256
# What some architectures ask of attention beyond the formula above.
_SPECIAL = ("softcap", "s_aux", "position_bias", "cache")


def use_short_attention(model: PreTrainedModel) -> bool:
    """Switch a CPU model that uses `sdpa` to this attention; says whether it did."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, Hkv, S, D], mask [B, 1, T, S].

    Returns [B, T, H, Dv] and no weights.
    """
    length = query.shape[2]
    special = dropout != 0.0 or any(kwargs.get(name) is not None for name in _SPECIAL)
    if special or not torch.is_grad_enabled() or not 1 < length <= LONGEST or key.shape[2] != length:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device)
        if getattr(module, "is_causal", True):
            attention_mask = attention_mask.tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = ShortAttention.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


class ShortAttention(torch.autograd.Function):
    """q [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> [B, H, T, Dv].

    mask [B or 1, 1, T, S], bool or additive
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        probabilities = _probabilities(q, k, mask, scale)
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return (probabilities.to(v.dtype) @ v).view(*q.shape[:3], v.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        probabilities = _probabilities(q, k, mask, ctx.scale)  # [B, Hkv, G T, S] fp32
        packed_q, packed_grad = _pack(q, k.shape[1]), _pack(grad, k.shape[1])
        grad_v = probabilities.to(v.dtype).transpose(-1, -2) @ packed_grad
        grad_p = (packed_grad @ v.transpose(-1, -2)).float()
        inner = (grad_p * probabilities).sum(dim=-1, keepdim=True)
        grad_scores = (grad_p.sub_(inner).mul_(probabilities).mul_(ctx.scale)).to(q.dtype)
        grad_q = (grad_scores @ k).view(q.shape)
        grad_k = grad_scores.transpose(-1, -2) @ packed_q
        return grad_q, grad_k, grad_v, None, None


def _pack(x: Tensor, kv_heads: int) -> Tensor:
    """[B, G Hkv, T, D] as [B, Hkv, G T, D]: the heads of a group are neighbours."""
    batch, heads, length, width = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * length, width)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale * Q K^T + mask) as fp32 [B, Hkv, G T, S]."""
    batch, kv_heads, keys, _ = k.shape
    if mask.dtype == torch.bool:
        # The lowest finite number, not -inf: a row of padding that sees no key must not become NaN.
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
    scores = (_pack(q, kv_heads).float() @ k.float().transpose(-1, -2)).mul_(scale)
    scores.view(batch, kv_heads, -1, q.shape[2], keys).add_(mask[:, :, None])  # [B, Hkv, G, T, S]
    return torch.softmax(scores, dim=-1)
