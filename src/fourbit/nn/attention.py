"""Attention while training on a CPU, registered with transformers as "fourbit".

Whole rows under causal masks run `ops.attention`: forward and backward in tiles, nothing of size T x T kept.
What a mask lets a query see is handed over as one number, the first key, so that no T x T mask is built
either, for causal masks, sliding windows, padding and packed rows alike. Any other mask, and what else an
architecture may ask for, goes to transformers' own `sdpa`.

`ShortAttention` takes any mask, and queries over a longer cache; evaluation uses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fourbit.kernels import native
from fourbit.memory.tracker import without_values
from fourbit.ops.attention import MOST_WIDTH

NAME = "fourbit"
# What some architectures ask of attention beyond the formula.
_SPECIAL = ("softcap", "s_aux", "position_bias", "cache")
#: Queries whose mask is looked at together: bounds its memory.
_MASK_ROWS = 256


def use_tiled_attention(model: PreTrainedModel) -> bool:
    """Switch a CPU model that uses `sdpa` to this attention; says whether it did."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa" or not native.available():
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, first_seen_mask)
    model.set_attn_implementation(NAME)
    return True


def first_seen_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, **kwargs: Any
) -> Tensor | None:
    """transformers' mask interface: int32 [B, T], the first key each query sees; None where that is key 0.

    A mask that is not of this form comes back as `sdpa`'s own, bool [B, 1, T, S].
    """

    def part(start: int, rows: int, **changed: Any) -> Tensor | None:
        return sdpa_mask(batch_size, rows, kv_length, q_offset=q_offset + start, **{**kwargs, **changed})

    if q_length != kv_length or q_offset:
        return part(0, q_length)
    if without_values():
        return torch.empty(batch_size, q_length, dtype=torch.int32)
    padding, window = kwargs.get("attention_mask"), kwargs.get("local_size")
    unpadded = padding is None or bool(padding.all())
    if kwargs.get("allow_is_causal_skip", True) and unpadded and (window is None or window > kv_length):
        return None
    found = []
    for start in range(0, q_length, _MASK_ROWS):
        rows = min(_MASK_ROWS, q_length - start)
        first = _first_seen(part(start, rows, allow_is_causal_skip=False), start)
        if first is None:
            return part(0, q_length)
        found.append(first)
    return torch.cat(found, dim=1)


def _first_seen(mask: Tensor | None, start: int) -> Tensor | None:
    """int32 [B, rows] for queries from `start` on, of bool [B, 1, rows, S]; None if they see other keys.

    A query that does not see itself is padding, whose result nobody reads: it gets its own key.
    """
    if mask is None or mask.dtype != torch.bool:
        return None
    seen, places = mask[:, 0], torch.arange(mask.shape[2], dtype=torch.int32, device=mask.device) + start
    real = seen[:, torch.arange(len(places)), places]  # [B, rows]
    first = seen.to(torch.uint8).argmax(dim=2).to(torch.int32)
    whole = seen.sum(dim=2) == places + 1 - first  # nothing left out in between, nothing seen beyond
    beyond = (
        (seen & (torch.arange(mask.shape[3], device=mask.device) > places[:, None])).flatten(1).any(dim=1)
    )
    if bool(beyond.any()) or not bool((whole | ~real).all()):
        return None
    return torch.where(real, first, places)


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
    """transformers' attention interface: query [B, H, T, D], key and value [B, Hkv, S, D], mask as above.

    Under autocast, as torch's own attention, in its dtype. Returns [B, T, H, Dv] and no weights.
    """
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    length, first = query.shape[2], None
    if attention_mask is None and getattr(module, "is_causal", True) and length > 1:
        first = torch.zeros(query.shape[0], length, dtype=torch.int32)
    elif attention_mask is not None and attention_mask.ndim == 2:
        first = attention_mask
    special = dropout != 0.0 or any(kwargs.get(name) is not None for name in _SPECIAL)
    if first is None or special or key.shape[2] != length or not _fits(query, key, value):
        mask = attention_mask if first is None else _as_bool(first)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = TiledAttention.apply(query, key, value, first, scale)  # type: ignore[no-untyped-call]
    return output, None


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    one_dtype = query.dtype == key.dtype == value.dtype
    return one_dtype and key.shape == value.shape and query.shape[3] <= MOST_WIDTH


def _as_bool(first: Tensor) -> Tensor:
    places = torch.arange(first.shape[1])
    return ((places >= first[:, :, None]) & (places <= places[:, None]))[:, None]


class TiledAttention(torch.autograd.Function):
    """q [B, H, T, D], k and v [B, Hkv, T, D], first int32 [B, T] -> [B, T, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> Tensor:
        o, lse = torch.ops.fourbit.attention(q, k, v, first, scale)
        output: Tensor = o.transpose(1, 2)  # contiguous, and the very memory that the next layer keeps
        ctx.save_for_backward(q, k, v, first, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first, output, lse = ctx.saved_tensors
        grads = torch.ops.fourbit.attention_backward(
            grad.transpose(1, 2), q, k, v, output.transpose(1, 2), lse, first, ctx.scale
        )
        return *grads, None, None


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
