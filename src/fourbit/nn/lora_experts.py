"""LoRA on experts in 4 bits, in the layout that PEFT has for parameters of this kind.

PEFT wraps an experts module once for each of its stacks that has an adapter (`lora.ParamWrapper`), with the
factors of all experts in two matrices: A [r E, in], an expert's rows one after another, and B [out, r E], an
expert's columns E apart. PEFT's wrapper adds the product of both to the float weights; this one hands the
factors to `Experts4bit`, which multiplies with them.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from fourbit.errors import ModelError
from fourbit.nn.experts import Experts4bit, Stack
from fourbit.nn.grouped import StackAdapter


class LoraExperts(ParamWrapper):
    """An adapter on one stack of an `Experts4bit`, or of one that has an adapter on its other stack."""

    def get_param(self) -> Tensor:
        """What PEFT asks shape, dtype and device of: the weight as it would be in fp32, without memory."""
        experts: Any = self.get_base_layer()
        device = getattr(experts, self.parameter_name).device
        return torch.zeros((), device=device).expand(self._stack.stored_shape)

    def forward(
        self, x: Tensor, *args: Any, adapters: dict[str, StackAdapter] | None = None, **kwargs: Any
    ) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)  # type: ignore[no-untyped-call]
        if kwargs.pop("adapter_names", None) is not None:
            raise ModelError("experts take one adapter for all rows of a batch, not one for each row")
        adapters = dict(adapters or {})
        if not self.disable_adapters:
            found = [self._factors(name) for name in self.active_adapters if name in self.lora_A]
            if found:
                adapters[self.parameter_name] = sum(found[1:], start=found[0])
        result: Tensor = self.base_layer(x, *args, adapters=adapters, **kwargs)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: adding to 4-bit codes would corrupt them."""
        raise ModelError(
            "an adapter cannot be merged into 4-bit weights in place; "
            "use merge_and_unload(), which gives 16-bit layers"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts, or with `merge` the model's own 16-bit ones: dequantized weights plus adapters."""
        experts: Any = self.get_base_layer()
        if not merge:
            packed: nn.Module = experts
            return packed
        weights = {name: experts.dequantize(name, torch.float32) for name in experts.stacks}
        wrapper: Any = self
        while isinstance(wrapper, LoraExperts):
            weight = weights[wrapper.parameter_name]
            for name in adapter_names or wrapper.active_adapters:
                if name in wrapper.lora_A:
                    wrapper._add_to(weight, name)
            wrapper = wrapper.base_layer
        if safe_merge and not all(weight.isfinite().all() for weight in weights.values()):
            raise ModelError("an adapter has weights that are not finite; it is damaged")
        dtypes = {name: stack.compute_dtype or stack.dtype for name, stack in experts.stacks.items()}
        return experts.unpacked({name: weight.to(dtypes[name]) for name, weight in weights.items()})

    @property
    def _stack(self) -> Stack:
        experts = self.get_base_layer()
        assert isinstance(experts, Experts4bit)
        return experts.stacks[self.parameter_name]

    def _factors(self, name: str) -> StackAdapter:
        count = self._stack.count
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        by_expert = b.float().reshape(b.shape[0], -1, count).permute(2, 0, 1) * float(self.scaling[name])
        return StackAdapter(a.float().reshape(count, -1, a.shape[1]), by_expert.contiguous())

    def _add_to(self, weight: Tensor, name: str) -> None:
        with torch.no_grad():
            factors = self._factors(name)
            for place, a, b in zip(weight, factors.a, factors.b, strict=True):
                (place.t() if self._stack.transposed else place).addmm_(b, a)


# PEFT knows a wrapper by the name of its class, and would refuse to wrap the module's second stack.
LoraExperts.__name__ = ParamWrapper.__name__
