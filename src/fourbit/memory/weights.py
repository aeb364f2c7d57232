"""What a model's parameters take, by kind: counted on the model itself, which may be on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.core_model_loading import dot_natural_key

from fourbit.nn.linear import Linear4bit


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parameters and counts of its weights.

    parameters  weights of the base, each tied one once; a 4-bit weight counts as one
    trainable   trained weights: those of adapters, or of the base under full fine-tuning
    codes       bytes of 4-bit codes
    scales      bytes of their scales
    rest        bytes of frozen weights in 16 or 32 bits
    trained     bytes of trained weights
    largest     weights in the largest packed matrix, which is restored whole where products need that
    widest      its longest side, over all packed matrices
    """

    parameters: int
    trainable: int
    codes: int
    scales: int
    rest: int
    trained: int
    largest: int
    widest: int


def count_weights(model: nn.Module) -> Weights:
    """Count what a model holds, as it would be loaded and adapted."""
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    codes = {id(layer.weight): layer for layer in packed}
    scales = {
        id(part)
        for layer in packed
        for part in (layer.weight_absmax, layer.weight_consts)
        if part is not None
    }
    others = [p for p in model.parameters() if id(p) not in codes and id(p) not in scales]
    trained = [p for p in others if p.requires_grad]
    sizes = [layer.in_features * layer.out_features for layer in codes.values()]
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    return Weights(
        parameters=sum(sizes) + sum(p.numel() for p in others) - sum(p.numel() for p in adapters),
        trainable=sum(p.numel() for p in trained),
        codes=sum(layer.weight.nbytes for layer in codes.values()),
        scales=sum(p.nbytes for p in model.parameters() if id(p) in scales),
        rest=sum(p.nbytes for p in others if not p.requires_grad),
        trained=sum(p.nbytes for p in trained),
        largest=max(sizes, default=0),
        widest=max((max(layer.in_features, layer.out_features) for layer in codes.values()), default=0),
    )


def loading_bytes(model: nn.Module, stored: torch.dtype, packed: bool) -> int:
    """What loading takes at its highest beyond all weights: one as it was read, beside those before it.

    stored  dtype of weights as they are read; one that stays in it is not copied
    packed  4-bit codes are stored too, and are not copied
    """
    layers = {id(m.weight): m for m in model.modules() if isinstance(m, Linear4bit)}
    weights = [(name, p) for name, p in model.named_parameters() if ".lora_" not in name]
    # transformers reads them in this order, whatever the file's is.
    weights.sort(key=lambda entry: dot_natural_key(entry[0]))
    held, highest = -sum(p.nbytes for _, p in weights), 0
    for _, parameter in weights:
        layer = layers.get(id(parameter))
        held += parameter.nbytes
        if layer is not None:
            copied = 0 if packed else layer.in_features * layer.out_features * stored.itemsize
        else:
            copied = 0 if parameter.dtype in (stored, torch.uint8) else parameter.numel() * stored.itemsize
        highest = max(highest, held + copied)
    return highest
