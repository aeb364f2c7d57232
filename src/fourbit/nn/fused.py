"""A decoder's norms, residual sums, gated MLPs and rotary embeddings as passes that keep little for backward.

`fuse` looks at structure, not at names of architectures: a module with one weight that computes RMS norm
(`norm`), one whose `gate_proj`, `up_proj` and `down_proj` make a gated MLP, one whose code turns queries and
keys (`rotary`), and a decoder layer of Llama's parts (`residual`). Each class is tried with small parts first
and is left as it is where the result differs; what another library wrapped runs its own code. LoRA layers
fuse themselves, and are asked which of them run PEFT's code instead, and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourbit.nn.norm import is_norm, norm_forward
from fourbit.nn.remake import remakable
from fourbit.nn.replaced import WIDTH, agrees, is_ours, random
from fourbit.nn.residual import is_layer, layer_forward
from fourbit.nn.rotary import calls_rotary, rotary_forward
from fourbit.ops.elementwise import ACTIVATIONS

_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, lambda x: F.gelu(x, approximate="tanh"))


@dataclass
class FuseReport:
    """matched: kind of module to how many run fused; left: class name to why its modules do not."""

    matched: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """For people."""
        found = ", ".join(f"{n} {kind}" for kind, n in self.matched.items()) or "nothing"
        left = "".join(f"; left {name}: {why}" for name, why in self.left.items())
        return f"fused: {found}{left}"


def fuse(model: nn.Module) -> FuseReport:
    """Run a transformers model's norms, layers, MLPs, rotary embeddings fused from now on; says which."""
    report, decided = FuseReport(), dict[Any, Callable[..., Any] | str]()
    reasons = Counter[str]()
    for module in model.modules():
        why = getattr(module, "why_not_fused", None)
        if why is not None:  # a LoRA layer of ours, whose function is fused by itself
            reason = why()
            if reason is None:
                report.matched["LoRA layers"] += 1
            else:
                reasons[reason] += 1
            continue
        if "forward" in module.__dict__:  # fused already, or wrapped by another library
            continue
        if is_norm(module):
            kind, decide = "RMS norms", norm_forward
        elif _is_gated(module):
            kind, decide = "gated MLPs", _gated_forward
        elif calls_rotary(module):
            kind, decide = "rotary embeddings", rotary_forward
        elif is_layer(module):
            kind, decide = "decoder layers", layer_forward
        else:
            continue
        name = type(module).__name__
        if type(module) not in decided:
            decided[type(module)] = decide(module)
        forward = decided[type(module)]
        if isinstance(forward, str):
            report.left[name] = forward
            continue
        module.forward = MethodType(forward, module)
        report.matched[kind] += 1
    if reasons:
        report.left["LoRA layers"] = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
    return report


def unfuse(model: nn.Module) -> None:
    """Give every module that `fuse` changed its own code back."""
    for module in model.modules():
        if is_ours(module.__dict__.get("forward")):
            del module.forward


def _is_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names) and len(
        list(module.children())
    ) == len(names)


def gated_kind(module: nn.Module) -> int | None:
    """The number in `ACTIVATIONS` of a gated MLP's activation; None for a module that is none."""
    forward = _gated_forward(module) if _is_gated(module) else ""
    return None if isinstance(forward, str) else int((forward.__kwdefaults__ or {})["number"])


def _gated_forward(module: Any) -> Callable[[nn.Module, Tensor], Tensor] | str:
    probe = torch.linspace(-6, 6, 97)
    given = module.act_fn(probe)
    kind = next((i for i, f in enumerate(_FUNCTIONS) if torch.allclose(f(probe), given, atol=1e-6)), None)
    if kind is None:
        return f"its activation is neither of {', '.join(ACTIVATIONS)}"

    def forward(self: Any, x: Tensor, *, number: int = kind) -> Tensor:
        product: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), number))
        return product

    inner = 2 * WIDTH
    shapes = {"gate_proj": (inner, WIDTH), "up_proj": (inner, WIDTH), "down_proj": (WIDTH, inner)}
    small = {name: _linear(random(*shape)) for name, shape in shapes.items()}
    return forward if agrees(module, forward, small) else "it computes more than that"


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """activation(gate) * up, activation by its number in `ACTIVATIONS`; keeps nothing but its inputs."""
    y: Tensor = _Gated.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return remakable(y, partial(torch.ops.fourbit.gated, kind=kind), gate, up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        y: Tensor = torch.ops.fourbit.gated(gate, up, kind)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.fourbit.gated_backward(grad, *ctx.saved_tensors, ctx.kind), None
