"""Checkpoints under quant_method "fourbit" (`formats.own`), matched with the model that they are of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fourbit.memory.mapped import MappedFile
from fourbit.model.formats import hf, own
from fourbit.model.formats.bnb import BnbScheme, restored
from fourbit.model.formats.lazy import LazyStack, LazyTensor
from fourbit.model.quantizer import FourBitConfig, pack_left
from fourbit.model.sizes import check_total
from fourbit.nn.experts import Expert, Experts4bit, Stack
from fourbit.nn.packed import packed_parts


def open_own(
    source: Path, skeleton: PreTrainedModel, stored: dict[str, Any], mapped: list[MappedFile] | None = None
) -> tuple[dict[str, LazyTensor], FourBitConfig]:
    """The tensors of a checkpoint, unread, and how they are held; the skeleton is packed as they are.

    stored  its quantization_config

    Raises ModelError for settings that are none, and for packed parameters that are missing or do not fit.
    """
    scheme = own.read_scheme(stored, str(source))
    tensors = hf.open_folder(source, mapped)
    check_total(source, skeleton, tensors)
    settings = FourBitConfig(
        scheme.quant_type, scheme.block_size, scheme.double_quant, modules_to_not_convert=list(scheme.left)
    )
    return own.checked(tensors, packed_as(skeleton, settings), str(source)), settings


def packed_as(skeleton: PreTrainedModel, settings: FourBitConfig) -> dict[str, tuple[int, ...]]:
    """Pack a model on the meta device so; the shapes of its packed parameters, by name."""
    pack_left(skeleton, settings)
    return {
        name: tuple(parameter.shape)
        for name, parameter in skeleton.named_parameters()
        if parameter.dtype == torch.uint8
    }


def restored_own(
    source: Path, skeleton: PreTrainedModel, stored: dict[str, Any]
) -> tuple[dict[str, LazyTensor], BnbScheme]:
    """The tensors of a checkpoint with packed ones restored to fp32, under the skeleton's names."""
    with torch.device("meta"):
        packed: Any = type(skeleton)(skeleton.config)
    tensors, settings = open_own(source, packed, stored)
    layers, stacks = dict[str, tuple[int, ...]](), dict[str, LazyTensor]()
    for part in packed_parts(packed):
        if isinstance(part.module, Experts4bit):
            stack = part.module.stacks[part.name.rpartition(".")[2]]
            stacks[part.name] = _restored_stack(tensors, part.name, stack)
        else:
            layers[part.name.removesuffix(".weight")] = part.shape
    scheme = BnbScheme(settings.quant_type, settings.block_size, settings.double_quant, layers)
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    found = restored(tensors, scheme, shapes, str(source))
    packed_names = {name + ending for name in stacks for ending in ("", "_absmax", "_consts")}
    return {name: t for name, t in found.items() if name not in packed_names} | stacks, scheme


def _restored_stack(tensors: dict[str, LazyTensor], name: str, stack: Stack) -> LazyStack:
    def matrix(number: int) -> Tensor:
        parts = {ending: tensors[name + ending].read() for ending in stack.sizes()}
        held = SimpleNamespace(**{f"stack{ending}": part for ending, part in parts.items()})
        return Expert(held, "stack", stack, number).dequantize(torch.float32)

    return LazyStack.of(matrix, torch.float32, stack.stored_shape, stack.transposed)
