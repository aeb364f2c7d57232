"""LoRA on packed and on plain linear layers: PEFT's layer, with one fused autograd function.

    y = x W^T + bias + s * dropout(x) A^T B^T        (Hu et al., arXiv:2106.09685; QLoRA eq. 5)

PEFT owns configuration, names, initialisation, variants and saving; `LoraLinear` is PEFT's
`lora.Linear` with another forward. The plain case (one active adapter, no variant) runs as one
autograd function that saves only x (or what x is cheaply made of) and the rank-r product: W is read again
from its 4-bit bytes in backward, and the dropout mask is made again from its keys (`lowrank` has the
products). Every other case runs PEFT's own code.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fourbit.defaults import CHANGES_BASE
from fourbit.errors import ModelError
from fourbit.kernels.product import Adapter, Dropout
from fourbit.nn.copies import own_copy
from fourbit.nn.dropout import KeySource, TokenKeys
from fourbit.nn.linear import Linear4bit, as_conv1d
from fourbit.nn.lowrank import adapter_gradients, adapter_product
from fourbit.nn.remake import Remake, remake_of
from fourbit.nn.replaced import runs_own_code

#: Initialisations that need the base's weights as numbers.
_FROM_BASE = (*CHANGES_BASE, "mica")


class LoraLinear(PeftLinear):
    """An adapter around a `Linear4bit` or a plain `nn.Linear`.

    layer_key   uint32 that names the layer in dropout masks
    key_source  what tells which tokens a forward sees; None, or nothing set: PEFT's own dropout
    """

    layer_key: int = 0
    key_source: KeySource | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._fused_adapter(x, args, kwargs)
        if adapter is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        dropout = self.lora_dropout[adapter]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        keys = self.key_source.current if p > 0 and self.key_source is not None else None
        a: Any = self.lora_A[adapter].weight
        b: Any = self.lora_B[adapter].weight
        base: Any = self.get_base_layer()
        scaling = float(self.scaling[adapter])
        if not torch.is_grad_enabled():
            flat = x.reshape(-1, x.shape[-1])
            y, _ = adapter_product(flat, base, _adapter(a, b, scaling, p, keys, self.layer_key))
            return y.reshape(*x.shape[:-1], -1)
        fused: Tensor = _FusedLora.apply(  # type: ignore[no-untyped-call]
            own_copy(x), a, b, base, scaling, p, keys, self.layer_key, remake_of(x)
        )
        return fused

    def _fused_adapter(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The one plain adapter that is active, or None where PEFT's own forward must run."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        adapter: str = self.active_adapters[0]
        if adapter not in self.lora_A or self._special(adapter) or torch.is_autocast_enabled(x.device.type):
            return None
        if self.training and not isinstance(self.lora_dropout[adapter], nn.Identity):
            keys = self.key_source.current if self.key_source is not None else None
            if keys is None or keys.rows.numel() * x.shape[-1] != x.numel():
                return None
        return adapter

    def why_not_fused(self) -> str | None:
        """Why PEFT's own forward runs in this layer, whatever it is given; None if it does not."""
        if len(self.active_adapters) != 1:
            return f"{len(self.active_adapters)} adapters are active"
        adapter = self.active_adapters[0]
        return self._special(adapter) if adapter in self.lora_A else None

    def _special(self, adapter: str) -> str | None:
        """What an adapter or its base has that the fused function lacks, or None."""
        base: Any = self.get_base_layer()
        parts = self.lora_A[adapter], self.lora_B[adapter], self.lora_dropout[adapter]
        dropout = type(parts[2])
        if adapter in self.lora_variant:
            return "DoRA" if self.use_dora[adapter] else type(self.lora_variant[adapter]).__name__
        if self.lora_bias[adapter]:
            return "the adapter has a bias"
        if not (isinstance(base, Linear4bit) or type(base) is nn.Linear):
            return f"the base is a {type(base).__name__}"
        if base.bias is not None and base.bias.requires_grad:
            return "the base's bias is trained"
        if type(base) is nn.Linear and base.weight.requires_grad:
            return "the base's weight is trained"
        if not all(runs_own_code(part) for part in parts):
            return "the adapter has hooks"
        if any(hasattr(parameter, "device_mesh") for part in parts for parameter in part.parameters()):
            return "the adapter is sharded"
        return None if dropout in (nn.Dropout, nn.Identity) else f"its dropout is a {dropout.__name__}"

    def plain_adapter(self) -> Adapter | None:
        """The one plain adapter that is active, without dropout; None where there is none or another kind."""
        base: Any = self.get_base_layer()
        name = self._fused_adapter(torch.empty(0, device=base.weight.device), (), {})
        if name is None:
            return None
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        return _adapter(a, b, float(self.scaling[name]), 0.0, None, 0)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """PEFT's, which adds an adapter; refused where it would start from weights that are packed."""
        start = str(config.init_lora_weights).lower()
        if isinstance(self.get_base_layer(), Linear4bit) and start.startswith(_FROM_BASE):
            raise ModelError(
                f"init_lora_weights='{start}' starts from the base's weights, which are in 4 bits here; take "
                "True, 'gaussian', 'orthogonal' or 'eva', or convert an adapter made on the 16-bit base to "
                "plain LoRA first (PEFT's path_initial_model_for_weight_conversion)"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def orthogonal_init(self, adapter_name: str) -> None:
        """PEFT's, which takes the dtype of the base's weight: packed bytes, so an fp32 layer is shown."""
        base = self.base_layer
        if isinstance(base, Linear4bit):
            self.base_layer = nn.Linear(1, 1, device="meta")
        try:
            super().orthogonal_init(adapter_name)  # type: ignore[no-untyped-call]
        finally:
            self.base_layer = base

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused on packed weights: adding to 4-bit codes would corrupt them."""
        if isinstance(self.get_base_layer(), Linear4bit):
            raise ModelError(
                "an adapter cannot be merged into 4-bit weights in place; "
                "use merge_and_unload(), which gives 16-bit layers"
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, or with `merge` a 16-bit one of dequantized weight plus adapters."""
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit):
            if merge:
                self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return base
        if not merge:
            return base
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        plain.weight = nn.Parameter(base.dequantize(torch.float32), requires_grad=False)
        plain.bias = base.bias
        self.base_layer = plain
        PeftLinear.merge(self, safe_merge=safe_merge, adapter_names=adapter_names)
        plain.weight.data = plain.weight.data.to(base.compute_dtype)
        return as_conv1d(plain) if base.transposed else plain


class _FusedLora(torch.autograd.Function):
    """x [..., K], A fp32 [r, K], B fp32 [N, r], frozen base layer -> y [..., N] in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        base: nn.Linear,
        scaling: float,
        p: float,
        keys: TokenKeys | None,
        layer_key: int,
        remake: Remake | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [T, K]
        adapter = _adapter(lora_a, lora_b, scaling, p, keys, layer_key)
        y, low = adapter_product(flat, base, adapter)
        ctx.save_for_backward(low, lora_a, lora_b, *([flat] if remake is None else remake.inputs))
        ctx.remake = None if remake is None else remake.function
        ctx.base, ctx.scaling, ctx.dropout, ctx.shape = base, scaling, adapter.dropout, x.shape
        # No view for autograd, which lets nobody add to one in place that a function returns (Falcon does).
        result: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, lora_a, lora_b, *made_of = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])  # [T, N]
        a, b = (part.detach().float().contiguous() for part in (lora_a, lora_b))
        adapter = Adapter(a, b, ctx.scaling, ctx.dropout)
        needs = ctx.needs_input_grad[:3]

        def flat() -> Tensor:
            x: Tensor = made_of[0] if ctx.remake is None else ctx.remake(*made_of)
            return x.reshape(-1, x.shape[-1])

        grad_x, grad_a, grad_b = adapter_gradients(grad, flat, low, ctx.base, adapter, needs)
        if grad_x is not None:
            grad_x = grad_x.reshape(ctx.shape)
        if grad_a is not None:
            grad_a = grad_a.to(lora_a.dtype)
        if grad_b is not None:
            grad_b = grad_b.to(lora_b.dtype)
        return grad_x, grad_a, grad_b, None, None, None, None, None, None


def _adapter(
    a: Tensor, b: Tensor, scaling: float, p: float, keys: TokenKeys | None, layer_key: int
) -> Adapter:
    dropout = None
    if keys is not None and p > 0.0:
        dropout = Dropout(keys.rows, keys.positions, layer_key, keys.seed, keys.step, p)
    return Adapter(a.detach().float().contiguous(), b.detach().float().contiguous(), scaling, dropout)
