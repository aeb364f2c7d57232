"""Checkpoints that store each expert's matrices apart, as most do, shown as the stacks that the model has.

transformers knows for each architecture which tensors make a stack, and would read all of them to put them
together. Here a stack stays a promise: each expert's matrix is read when it is quantized or merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fourbit.errors import ModelError
from fourbit.model.formats.lazy import LazyStack, LazyTensor
from fourbit.nn.experts import STACKS, experts_modules


def stacked(
    tensors: dict[str, LazyTensor], skeleton: PreTrainedModel, where: str
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """A mixture's tensors under the model's names, its stacks as `LazyStack`, and the names of renamed ones.

    Another model's tensors are left as they are. Raises ModelError for an expert that is missing.
    """
    stacks = {
        f"{name}.{leaf}": (tuple(module.get_parameter(leaf).shape), bool(module.is_transposed))
        for name, module in experts_modules(skeleton)
        for leaf in STACKS
    }
    if not stacks:
        return tensors, {}
    conversions = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    order = {
        pattern: place
        for entry in converters
        if _joins_rows(entry)
        for place, pattern in enumerate(entry.source_patterns)
    }
    names = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    result: dict[str, LazyTensor] = {}
    renames: dict[str, str] = {}
    parts: dict[str, dict[int, list[str]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters)
        if name not in names:
            name = key
        if name in stacks and pattern in order:
            parts.setdefault(name, {}).setdefault(order[pattern], []).append(key)
        elif name in stacks and pattern is None:
            result[name] = _whole(tensors[key], *stacks[name])
        elif pattern is None and name != key:
            result[name], renames[name] = tensors[key], key
        else:
            result[key] = tensors[key]
    for name, found in parts.items():
        columns = [found[place] for place in sorted(found)]
        result[name] = _joined(tensors, columns, stacks[name][0], f"{where}: '{name}'")
    return result, renames


def _joins_rows(converter: Any) -> bool:
    """Whether a stack is just the experts' matrices, each of which is the rows of its tensors together."""
    merge, *rest = converter.operations
    if type(merge) is not MergeModulelist or merge.dim != 0:
        return False
    return not rest or (len(rest) == 1 and type(rest[0]) is Concatenate and rest[0].dim == 1)


def _whole(tensor: LazyTensor, shape: tuple[int, ...], transposed: bool) -> LazyTensor:
    """A stack that is stored as the model has it."""
    if tensor.shape is None or tensor.shape != shape:  # an error of its own says so
        return tensor

    def matrix(number: int) -> Tensor:
        part = tensor.read()[number]
        return part.t().contiguous() if transposed else part

    return LazyStack.of(matrix, tensor.dtype, shape, transposed)


def _joined(
    tensors: dict[str, LazyTensor], columns: list[list[str]], shape: tuple[int, ...], where: str
) -> LazyTensor:
    count = shape[0]
    if any(len(column) != count for column in columns):
        found = " and ".join(str(len(column)) for column in columns)
        raise ModelError(f"{where} needs the matrices of {count} experts, {found} are there")
    sources = tuple(zip(*columns, strict=True))
    sides = [tensors[name].shape or () for name in sources[0]]
    if any([tensors[name].shape or () for name in row] != sides for row in sources):
        raise ModelError(f"{where}: its experts' matrices differ in shape")
    if any(len(side) != 2 or side[1] != sides[0][1] for side in sides):
        raise ModelError(f"{where}: its experts' matrices do not fit together")

    def matrix(number: int) -> Tensor:
        rows = [tensors[name].read() for name in sources[number]]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    heights = tuple(side[0] for side in sides)
    joined = (count, sum(heights), sides[0][1])
    return LazyStack.of(matrix, tensors[sources[0][0]].dtype, joined, False, sources, heights)
