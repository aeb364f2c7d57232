"""Where a transformers model keeps its decoder layers."""

from __future__ import annotations

from torch import nn

from fourbit.errors import ModelError


def layer_list(decoder: nn.Module, layers: int) -> tuple[nn.Module, str]:
    """The module that holds the list of so many decoder layers, and the list's name in it.

    Raises ModelError where there is none.
    """
    for module in decoder.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == layers:
                return module, name
    raise ModelError(f"{type(decoder).__name__}: no list of {layers} decoder layers was found in it")
