"""Checkpoints under quant_method "fourbit": what bitsandbytes' format cannot hold, such as packed experts.

Every tensor has the name that it has in the model. A linear layer's packed weight is

    NAME.weight, NAME.weight_absmax, NAME.weight_consts                     (`nn.linear`)

and a stack of experts

    NAME.gate_up_proj, NAME.gate_up_proj_absmax, NAME.gate_up_proj_consts   (`nn.experts`)
    NAME.down_proj, ...

all uint8; without double quantization there are no `_consts`. config.json's `quantization_config` has
quant_type, block_size, double_quant, and in modules_to_not_convert the layers and experts that are not
packed. Shapes are those that the model's own configuration implies.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fourbit.codebooks import QUANT_TYPES
from fourbit.defaults import BLOCK_SIZES
from fourbit.errors import ModelError
from fourbit.model.formats.lazy import LazyTensor


@dataclass(frozen=True)
class OwnScheme:
    """What `quantization_config` says."""

    quant_type: str
    block_size: int
    double_quant: bool
    left: tuple[str, ...]  # linear layers and experts that are not packed


def is_own(quantization_config: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether a config.json's quantization_config announces a checkpoint of this kind."""
    return isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "fourbit"


def own_config(quant_type: str, block_size: int, double_quant: bool, left: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint of this kind."""
    return {
        "quant_method": "fourbit",
        "quant_type": quant_type,
        "block_size": block_size,
        "double_quant": double_quant,
        "modules_to_not_convert": left,
    }


def read_scheme(config: dict[str, Any], where: str) -> OwnScheme:
    """Raises ModelError for settings that are none."""
    quant_type, block_size = config.get("quant_type"), config.get("block_size")
    double_quant, left = config.get("double_quant"), config.get("modules_to_not_convert")
    if (
        quant_type not in QUANT_TYPES
        or str(block_size) not in map(str, BLOCK_SIZES)
        or not isinstance(double_quant, bool)
        or not isinstance(left, list)
        or not all(isinstance(name, str) for name in left)
    ):
        raise ModelError(f"{where}: the quantization_config in config.json is malformed; download it again")
    return OwnScheme(str(quant_type), int(str(block_size)), double_quant, tuple(left))


def checked(
    tensors: dict[str, LazyTensor], wanted: dict[str, tuple[int, ...]], where: str
) -> dict[str, LazyTensor]:
    """The tensors with packed ones in the shapes that the model has for them.

    wanted  shapes of the model's packed parameters, by name

    Raises ModelError for one that is missing, or holds something else.
    """
    result = dict(tensors)
    for name, shape in wanted.items():
        stored = tensors.get(name)
        if stored is None:
            raise ModelError(f"{where}: '{name}' is missing; is the checkpoint complete?")
        if stored.dtype != torch.uint8 or prod(stored.shape or ()) != prod(shape):
            raise ModelError(
                f"{where}: '{name}' has shape {list(stored.shape or ())} of {stored.dtype}, the config says "
                f"{list(shape)} of bytes"
            )

        def read(stored: LazyTensor = stored, shape: tuple[int, ...] = shape) -> Tensor:
            return stored.read().view(shape)

        result[name] = LazyTensor(read, torch.uint8, shape)
    return result
