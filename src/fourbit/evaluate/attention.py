"""Which attention a model uses while it is evaluated.

Masks here are made from positions, which flash attention cannot take: such models go to `sdpa`. On a CPU,
for few queries over a cache, torch's fused kernel is slower than the plain products, and transformers
copies every key and value for each query head of a group: there `ShortAttention` takes 0.5 to 0.75 of the
time. It is exact up to rounding, and computes in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fourbit.nn.attention import ShortAttention

NAME = "fourbit_cached"
#: From here on torch's fused kernel is the faster one.
_MOST_QUERIES = 128
#: What some architectures ask of attention beyond softmax(q k^T) v, which is left to transformers.
_SPECIAL = ("softcap", "s_aux", "position_bias", "cache")


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, Hkv, S, D], mask [B, 1, T, S].

    Returns [B, T, H, D] and no weights.
    """
    special = any(kwargs.get(name) is not None for name in _SPECIAL)
    if attention_mask is None or special or query.shape[2] > _MOST_QUERIES:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # All in fp32: the cache has another length at every step, and oneDNN generates code for each new shape of
    # a bf16 product (`fourbit.shapes`).
    wide = (tensor.float() for tensor in (query, key, value))
    output: Tensor = ShortAttention.apply(*wide, attention_mask, scale)  # type: ignore[no-untyped-call]
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


@contextmanager
def evaluation_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model attends as described above inside this context, and as before after it."""
    before = model.config._attn_implementation
    wanted = NAME if model.device.type == "cpu" else "sdpa"
    if before in ("eager", wanted):
        yield
        return
    AttentionInterface.register(NAME, cached_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(wanted)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
