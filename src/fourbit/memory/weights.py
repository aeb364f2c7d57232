"""What a model's parameters take, by kind: counted on the model itself, which may be on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.core_model_loading import dot_natural_key

from fourbit.nn.packed import packed_parts


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
    codes = {id(part.codes): part for part in packed_parts(model)}
    scales = {id(parameter) for part in codes.values() for parameter in part.scales}
    others = [p for p in model.parameters() if id(p) not in codes and id(p) not in scales]
    trained = [p for p in others if p.requires_grad]
    shapes = {part.shape for part in codes.values()}
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    return Weights(
        parameters=sum(part.weights for part in codes.values())
        + sum(p.numel() for p in others)
        - sum(p.numel() for p in adapters),
        trainable=sum(p.numel() for p in trained),
        codes=sum(part.codes.nbytes for part in codes.values()),
        scales=sum(p.nbytes for p in model.parameters() if id(p) in scales),
        rest=sum(p.nbytes for p in others if not p.requires_grad),
        trained=sum(p.nbytes for p in trained),
        largest=max((rows * columns for rows, columns in shapes), default=0),
        widest=max((max(shape) for shape in shapes), default=0),
    )


def loading_bytes(model: nn.Module, stored: torch.dtype, packed: bool) -> int:
    """What loading takes at its highest beyond all weights: one as it was read, beside those before it.

    stored  dtype of weights as they are read; one that stays in it is not copied
    packed  4-bit codes are stored too, and are not copied
    """
    parts = {id(part.codes): part for part in packed_parts(model)}
    weights = [(name, p) for name, p in model.named_parameters() if ".lora_" not in name]
    # transformers reads them in this order, whatever the file's is.
    weights.sort(key=lambda entry: dot_natural_key(entry[0]))
    held, highest = -sum(p.nbytes for _, p in weights), 0
    for _, parameter in weights:
        part = parts.get(id(parameter))
        held += parameter.nbytes
        if part is not None:
            copied = 0 if packed else part.weights // part.count * stored.itemsize
        else:
            copied = 0 if parameter.dtype in (stored, torch.uint8) else parameter.numel() * stored.itemsize
        highest = max(highest, held + copied)
    return highest
