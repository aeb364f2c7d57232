"""A decoder's norms, gated MLPs and rotary embeddings as single passes that keep little for backward.

`fuse` looks at structure, not at names of architectures: a module with one weight that computes RMS norm,
with weight or with 1 + weight, a module whose `gate_proj`, `up_proj` and `down_proj` make a gated MLP, and
one whose code turns queries and keys (`rotary`). Each class is tried with small weights first and is left as
it is where the result differs; a norm that is trained, and what another library wrapped, runs its own code.
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

from fourbit.nn import rotary
from fourbit.nn.remake import remakable
from fourbit.nn.rotary import calls_rotary, rotary_forward
from fourbit.ops.elementwise import ACTIVATIONS

_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, lambda x: F.gelu(x, approximate="tanh"))
#: Width of the input on which a class is tried.
_WIDTH = 16


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
    """Run a transformers model's norms, gated MLPs, rotary embeddings fused from now on; says which."""
    report, decided = FuseReport(), dict[Any, Callable[..., Any] | str]()
    for module in model.modules():
        if "forward" in module.__dict__:  # fused already, or wrapped by another library
            continue
        if _is_norm(module):
            kind, decide = "RMS norms", _norm_forward
        elif _is_gated(module):
            kind, decide = "gated MLPs", _gated_forward
        elif calls_rotary(module):
            kind, decide = "rotary embeddings", rotary_forward
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
    return report


def unfuse(model: nn.Module) -> None:
    """Give every module that `fuse` changed its own code back."""
    for module in model.modules():
        if _is_ours(module.__dict__.get("forward")):
            del module.forward


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.named_parameters())
    return (
        type(module).__name__.endswith("RMSNorm")
        and [name for name, _ in parameters] == ["weight"]
        and parameters[0][1].ndim == 1
        and norm_eps(module) is not None
    )


def norm_eps(module: nn.Module) -> float | None:
    """The eps of a norm; None where it has none under a name that is known."""
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _is_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names) and len(
        list(module.children())
    ) == len(names)


def norm_added(module: nn.Module) -> float | None:
    """What an RMS norm adds to its weight, 0 or 1; None for a module that is none."""
    forward = _norm_forward(module) if _is_norm(module) else ""
    return None if isinstance(forward, str) else float((forward.__kwdefaults__ or {})["added"])


def gated_kind(module: nn.Module) -> int | None:
    """The number in `ACTIVATIONS` of a gated MLP's activation; None for a module that is none."""
    forward = _gated_forward(module) if _is_gated(module) else ""
    return None if isinstance(forward, str) else int((forward.__kwdefaults__ or {})["number"])


def runs_own_code(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward, or ours in its place, and nothing else."""
    forward = module.__dict__.get("forward")
    ours = forward is None or _is_ours(forward)
    return ours and not module._forward_hooks and not module._forward_pre_hooks


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, MethodType) and forward.__func__.__module__ in (__name__, rotary.__name__)


def _norm_forward(module: Any) -> Callable[[nn.Module, Tensor], Tensor] | str:
    for added in (0.0, 1.0):

        def forward(self: Any, hidden_states: Tensor, *, added: float = added) -> Tensor:
            if self.weight.requires_grad:
                own: Tensor = type(self).forward(self, hidden_states)
                return own
            weight = self.weight.float() + added if added else self.weight.float()
            return rms_norm(hidden_states, weight, norm_eps(self) or 0.0)

        weight = nn.Parameter(_random(_WIDTH), requires_grad=False)
        if _agrees(module, forward, {"weight": weight}):
            return forward
    return "it is another norm"


def _gated_forward(module: Any) -> Callable[[nn.Module, Tensor], Tensor] | str:
    probe = torch.linspace(-6, 6, 97)
    given = module.act_fn(probe)
    kind = next((i for i, f in enumerate(_FUNCTIONS) if torch.allclose(f(probe), given, atol=1e-6)), None)
    if kind is None:
        return f"its activation is neither of {', '.join(ACTIVATIONS)}"

    def forward(self: Any, x: Tensor, *, number: int = kind) -> Tensor:
        product: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), number))
        return product

    inner = 2 * _WIDTH
    shapes = {"gate_proj": (inner, _WIDTH), "up_proj": (inner, _WIDTH), "down_proj": (_WIDTH, inner)}
    small = {name: _linear(_random(*shape)) for name, shape in shapes.items()}
    return forward if _agrees(module, forward, small) else "it computes more than that"


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _agrees(module: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], small: dict[str, Any]) -> bool:
    """Whether a forward gives what the module's class gives, with small parts in the place of its own.

    So the answer depends on the class alone, and the module's weights may lie anywhere or nowhere.
    """
    whole = {name: getattr(module, name) for name in small}
    x = _random(2, 3, _WIDTH)
    try:
        for name, part in small.items():
            setattr(module, name, part)
        with torch.no_grad():
            return torch.allclose(type(module).forward(module, x), forward(module, x), rtol=1e-5, atol=1e-5)
    finally:
        for name, part in whole.items():
            setattr(module, name, part)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x weight / sqrt(mean(x^2) + eps) over the last dimension of x [.., K]; weight fp32 [K], no gradient."""
    rows: Tensor = _RmsNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps)  # type: ignore[no-untyped-call]
    return remakable(rows.view(x.shape), partial(_norm_again, eps=eps), x, weight)


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """activation(gate) * up, activation by its number in `ACTIVATIONS`; keeps nothing but its inputs."""
    y: Tensor = _Gated.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return remakable(y, partial(torch.ops.fourbit.gated, kind=kind), gate, up)


def _norm_again(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = torch.ops.fourbit.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)[0]
    return y.view(x.shape)


class _RmsNorm(torch.autograd.Function):
    """Of rows [T, K]: what a function returns as a view could not be changed in place by who gets it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y: Tensor
        y, scale = torch.ops.fourbit.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.fourbit.rms_norm_backward(grad, *ctx.saved_tensors), None, None


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
