"""Decoder layers whose residual sums are part of what is computed beside them.

    h = x + attention(norm(x))        y = h + mlp(norm(h))        (Llama, arXiv:2302.13971, and descendants)

Of torch's operators each sum is a pass and a result of its own; backward adds up the gradients of queries,
keys and values, of gate and up, and of what goes past each norm, one by one. Here the first sum is part of
the second norm, and each norm's backward adds up what comes back to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.nn.norm import fused_norm, sum_norm
from fourbit.nn.replaced import WIDTH, random
from fourbit.ops.elementwise import MOST_GRADS

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
#: Who reads the norms' results: queries, keys, values; gate and up.
_READERS = (MOST_GRADS, 2)
#: Of a norm: a residual stream, what is added to it or None, readers -> their sum, its norm.
SumNorm = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor]]


def is_layer(module: nn.Module) -> bool:
    """Whether a module has a decoder layer's parts under Llama's names, and nothing else."""
    return {name for name, _ in module.named_children()} == set(_PARTS)


def layer_forward(module: nn.Module) -> Callable[..., Any] | str:
    """The forward in place of a layer's own; a reason where its class computes something else."""
    return _forward if _agrees(module) else "its residual sums are others"


def _forward(self: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
    first, second = fused_norm(self.input_layernorm), fused_norm(self.post_attention_layernorm)
    caches = bool(named.get("use_cache")) or named.get("past_key_values") is not None
    if args or caches or first is None or second is None or not torch.is_grad_enabled():
        return type(self).forward(self, hidden_states, *args, **named)
    norms = partial(_sum_norm, first), partial(_sum_norm, second)
    run = partial(_layer, norms[0], self.self_attn, norms[1], self.mlp, named)
    recompute = self.training and getattr(self, "gradient_checkpointing", False)
    if recompute and _checkpoints_itself(type(self).forward):
        return self._gradient_checkpointing_func(run, hidden_states)
    return run(hidden_states)


def _checkpoints_itself(forward: Any) -> bool:
    """Whether a class's forward decides what is recomputed; older transformers do so around it."""
    return "gradient_checkpointing" in forward.__code__.co_names


def _sum_norm(
    norm: tuple[Tensor, float], x: Tensor, more: Tensor | None, readers: int
) -> tuple[Tensor, Tensor]:
    return sum_norm(x, more, *norm, readers)


def _layer(
    first: SumNorm, attention: nn.Module, second: SumNorm, mlp: nn.Module, named: dict[str, Any], x: Tensor
) -> Tensor:
    x, normed = first(x, None, _READERS[0])
    h, normed = second(x, attention(hidden_states=normed, **named)[0], _READERS[1])
    more: Tensor = mlp(normed)
    if more.dtype != h.dtype:
        return h + more
    y: Tensor = _Add.apply(h, more)  # type: ignore[no-untyped-call]
    return y


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor) -> Tensor:
        y: Tensor = torch.ops.fourbit.add(x, more)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class _Try(nn.Module):
    """A part that computes factor * x + tanh(x) and remembers what else it was given."""

    def __init__(self, factor: float, pair: bool = False) -> None:
        super().__init__()
        self.factor, self.pair, self.named = factor, pair, dict[str, Any]()

    def forward(self, hidden_states: Tensor, **named: Any) -> Any:
        self.named = named
        y = self.factor * hidden_states + torch.tanh(hidden_states)
        return (y, None) if self.pair else y


def _agrees(module: Any) -> bool:
    """Whether the class computes the same, training, with simple parts in the place of its own."""
    whole, training = {name: getattr(module, name) for name in _PARTS}, module.training
    small = [_Try(0.5), _Try(-1.5, pair=True), _Try(2.0), _Try(0.25)]
    x, angles = random(2, 3, WIDTH), random(1, 3, 4)
    named: dict[str, Any] = dict.fromkeys(("attention_mask", "position_ids", "past_key_values"))
    named["use_cache"], named["position_embeddings"] = False, (angles, angles)
    first, attention, second, mlp = small

    def norm(part: _Try) -> SumNorm:
        def found(x: Tensor, more: Tensor | None, _: int) -> tuple[Tensor, Tensor]:
            total = x if more is None else x + more
            return total, part(total)

        return found

    try:
        for name, part in zip(_PARTS, small, strict=True):
            setattr(module, name, part)
        module.training = True
        with torch.no_grad():
            theirs, given = type(module).forward(module, x, **named), attention.named
            ours = _layer(norm(first), attention, norm(second), mlp, named, x)
        same = given.keys() == attention.named.keys() and all(given[k] is named[k] for k in given)
        return same and isinstance(theirs, Tensor) and torch.allclose(theirs, ours, atol=1e-6)
    except Exception:  # a class that wants more of its parts
        return False
    finally:
        module.training = training
        for name, part in whole.items():
            setattr(module, name, part)
