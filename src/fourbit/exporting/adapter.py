"""A PEFT LoRA adapter read for merging: what it adds to which weight, and what it replaces.

PEFT adds to a weight W [out, in] of a layer with A [r, in] and B [out, r]
    W + s B A                       s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)
    m (W + s B A) / |W + s B A|     with DoRA's magnitudes m [out], norms by row (arXiv:2402.09353)
Its ranks and alphas may differ by layer. To a mixture's stacks of matrices W_e it adds s B_e A_e, with the
factors of all experts in A [r E, in], one after another, and B [out, r E], E columns apart. Whatever else an
adapter can hold is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourbit.defaults import CHANGES_BASE
from fourbit.errors import ModelError
from fourbit.model.adapter_folder import PREFIX, rank_and_scaling, unwrapped, weights_file
from fourbit.model.finite import check_stored
from fourbit.model.formats.lazy import LazyTensor
from fourbit.nn.experts import is_experts

_PART = re.compile(r"^(?P<module>.+)\.(?P<part>lora_[A-Za-z_]+?)(?:\.weight)?$")
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
#: Settings of `peft.LoraConfig` under which a layer computes something other than the formulas above.
_UNMERGEABLE = (
    "lora_bias", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "alora_invocation_tokens", "layer_replication", "trainable_token_indices",
)  # fmt: skip


@dataclass(frozen=True)
class LoraDelta:
    """What a LoRA layer does to the weight of one module.

    a, b        [r, in] and [out, r]; of an embedding [r, tokens] and [features, r]
    scaling     alpha / r, or alpha / sqrt(r)
    magnitude   DoRA's [out], or None
    transposed  the weight is stored [in, out] (GPT-2's Conv1D, and embeddings)
    """

    a: LazyTensor
    b: LazyTensor
    scaling: float
    magnitude: LazyTensor | None
    transposed: bool

    def apply(self, weight: Tensor) -> Tensor:
        """The merged weight in fp32; `weight` stays as it is."""
        w = weight.to(torch.float32, copy=True)  # it may be a view of the checkpoint file
        oriented = w.t() if self.transposed else w
        a, b = self.a.read().to(torch.float32), self.b.read().to(torch.float32)
        oriented.addmm_(b, a, alpha=self.scaling)
        if self.magnitude is not None:
            magnitude = self.magnitude.read().to(torch.float32).reshape(-1)
            oriented.mul_((magnitude / torch.linalg.norm(oriented, dim=1))[:, None])
        return w


@dataclass(frozen=True)
class StackDelta:
    """What a LoRA wrapper does to the matrices of a stack of experts; a [r E, in], b [out, r E]."""

    a: LazyTensor
    b: LazyTensor
    scaling: float
    count: int

    def apply(self, number: int, matrix: Tensor) -> Tensor:
        """One merged matrix [out, in] in fp32; the given one stays as it is."""
        a, b = _factors(self)
        rank = len(a) // self.count
        rows = a[number * rank : (number + 1) * rank]
        return torch.addmm(matrix.to(torch.float32), b[:, number :: self.count], rows, alpha=self.scaling)


@lru_cache(maxsize=1)
def _factors(delta: StackDelta) -> tuple[Tensor, Tensor]:
    """A and B in fp32: read and checked once for all the experts of a stack, which are merged in turn."""
    return delta.a.read().to(torch.float32), delta.b.read().to(torch.float32)


@dataclass(frozen=True)
class Adapter:
    """An adapter matched with the model it is for.

    deltas    by the name of the weight they change
    replaced  parameters that the adapter holds whole (PEFT's modules_to_save), by name
    config    its adapter_config.json
    """

    folder: Path
    deltas: dict[str, LoraDelta | StackDelta]
    replaced: dict[str, LazyTensor]
    config: dict[str, Any]

    @property
    def method(self) -> str:
        """Such as "LoRA", "rsLoRA" or "rsLoRA with DoRA"."""
        name = "rsLoRA" if self.config.get("use_rslora") else "LoRA"
        return f"{name} with DoRA" if self.config.get("use_dora") else name


def read_adapter(folder: Path, skeleton: PreTrainedModel, config: dict[str, Any]) -> Adapter:
    """Open an adapter and find the place of each of its parts in a model; nothing is read yet.

    Raises ModelError for another method than LoRA, a variant that cannot be merged, a part without a
    place, and shapes that do not fit.
    """
    _check_mergeable(folder, config)
    layers: dict[str, dict[str, LazyTensor]] = {}
    replaced: dict[str, LazyTensor] = {}
    for key, tensor in _open(folder).items():
        name = key.removeprefix(PREFIX)
        match = _PART.match(name)
        if match is None:
            replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
        elif match["part"] in _PARTS:
            layers.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            raise ModelError(f"{folder}: '{key}' is not a part of a LoRA adapter that can be merged")
    if not layers and not replaced:
        raise ModelError(f"{folder}: this adapter is empty")
    deltas: dict[str, LoraDelta | StackDelta] = {}
    wrapped: dict[str, list[dict[str, LazyTensor]]] = {}
    for module in sorted(layers, key=len, reverse=True):  # PEFT's wrappers of one module from the innermost
        target = _module(folder, skeleton, unwrapped(module))
        if is_experts(target):
            wrapped.setdefault(unwrapped(module), []).append(layers[module])
        else:
            deltas[f"{module}.weight"] = _delta(folder, config, module, layers[module], target)
    for module, parts in wrapped.items():
        deltas |= _stack_deltas(folder, config, module, parts, skeleton.get_submodule(module))
    for name, tensor in replaced.items():
        owner, _, leaf = name.rpartition(".")
        known = getattr(_module(folder, skeleton, owner), leaf, None)
        if not isinstance(known, Tensor):
            raise ModelError(f"{folder}: '{name}' has no place in this model")
        if not _fits(name, tensor, tuple(known.shape), skeleton):
            raise _misfit(folder, name, tensor.shape, tuple(known.shape))
    return Adapter(folder, deltas, replaced, config)


def _check_mergeable(folder: Path, config: dict[str, Any]) -> None:
    method = config.get("peft_type", "unknown")
    if method != "LORA":
        raise ModelError(f"{folder}: a {method} adapter; only LoRA adapters can be merged")
    if config.get("bias", "none") != "none":
        raise ModelError(
            f"{folder}: bias={config['bias']}: trained biases cannot be merged; train with bias=none"
        )
    for key in _UNMERGEABLE:
        if config.get(key):
            raise ModelError(f"{folder}: an adapter with {key} cannot be merged into plain weights")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise ModelError(f"{folder}: target_parameters is no list of names")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        raise ModelError(
            f"{folder}: started from {start}, which changes the base as well; save it again with "
            "path_initial_model_for_weight_conversion (see PEFT) to make it an ordinary adapter"
        )


def _open(folder: Path) -> dict[str, LazyTensor]:
    file = weights_file(folder)
    try:
        handle = safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: truncated or damaged ({error})") from None

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor: Tensor = handle.get_tensor(name)
            check_stored(tensor, f"{file}: '{name}'")
            return tensor

        return read

    return {
        name: LazyTensor(reader(name), torch.float32, tuple(handle.get_slice(name).get_shape()))
        for name in handle.keys()  # noqa: SIM118 - safe_open is not a mapping
    }


def _delta(
    folder: Path, config: dict[str, Any], module: str, parts: dict[str, LazyTensor], target: nn.Module
) -> LoraDelta:
    embedding = isinstance(target, nn.Embedding)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    magnitude = parts.get("lora_magnitude_vector")
    if not isinstance(target, nn.Linear | Conv1D | nn.Embedding) or (embedding and magnitude is not None):
        what = "DoRA on an embedding" if embedding else f"LoRA on a {type(target).__name__}"
        raise ModelError(f"{folder}: {what} ('{module}') cannot be merged")
    missing = [name for name in names if name not in parts]
    if bool(config.get("use_dora")) != (magnitude is not None):
        missing.append("lora_magnitude_vector")
    if missing:
        raise ModelError(f"{folder}: '{module}' and the configuration disagree about {missing[0]}")
    a, b = parts[names[0]], parts[names[1]]
    assert a.shape is not None
    assert b.shape is not None
    # Known by the layer's class: PEFT corrects a wrong fan_in_fan_out in the same way.
    transposed = not isinstance(target, nn.Linear)
    rank, scaling = rank_and_scaling(folder, config, module)
    weight = tuple(target.weight.shape)
    expected = (weight[::-1] if transposed else weight, rank)
    # Of one dimension, say, in a file that is no adapter's.
    flat = len(a.shape) != 2 or len(b.shape) != 2
    if flat or ((b.shape[0], a.shape[1]), a.shape[0]) != expected or b.shape[1] != rank:
        raise ModelError(
            f"{folder}: '{module}' has A {list(a.shape)} and B {list(b.shape)}, which does not fit a weight "
            f"{list(weight)} at rank {rank}; is this the adapter's base?"
        )
    if magnitude is not None and magnitude.shape is not None and math.prod(magnitude.shape) != b.shape[0]:
        raise _misfit(folder, f"{module}.lora_magnitude_vector", magnitude.shape, (b.shape[0],))
    return LoraDelta(a, b, scaling, magnitude, transposed)


def _stack_deltas(
    folder: Path, config: dict[str, Any], module: str, parts: list[dict[str, LazyTensor]], target: Any
) -> dict[str, StackDelta]:
    """What the wrappers of an experts module, from the innermost, do to the stacks that they are for."""
    wanted = config.get("target_parameters") or ()
    names = [f"{module}.{leaf}" for leaf in target._parameters]
    names = [name for name in names if any(f".{name}".endswith(f".{ending}") for ending in wanted)]
    if len(names) != len(parts):
        raise ModelError(
            f"{folder}: holds {len(parts)} factors for '{module}', its target_parameters name {len(names)}"
        )
    deltas = {}
    for name, factors in zip(names, parts, strict=True):
        if sorted(factors) != ["lora_A", "lora_B"]:
            raise ModelError(f"{folder}: '{name}' has {', '.join(sorted(factors))}, not lora_A and lora_B")
        rank, scaling = rank_and_scaling(folder, config, name)
        count, *sides = target.get_parameter(name.rpartition(".")[2]).shape
        out_features, in_features = sides[::-1] if target.is_transposed else sides
        expected = (rank * count, in_features), (out_features, rank * count)
        a, b = factors["lora_A"], factors["lora_B"]
        if (a.shape, b.shape) != expected:
            raise ModelError(
                f"{folder}: '{name}' has A {list(a.shape or ())} and B {list(b.shape or ())}, which does not "
                f"fit {count} experts of [{out_features}, {in_features}] at rank {rank}; is this the "
                "adapter's base?"
            )
        deltas[name] = StackDelta(a, b, scaling, count)
    return deltas


def _module(folder: Path, skeleton: PreTrainedModel, name: str) -> nn.Module:
    try:
        return skeleton.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"{folder}: '{name}' has no place in a {type(skeleton).__name__} of this shape; "
            "is this the adapter's base?"
        ) from None


def _fits(name: str, tensor: LazyTensor, shape: tuple[int, ...], skeleton: PreTrainedModel) -> bool:
    """Whether a replaced parameter can take its place; embedding and head may have grown by new tokens."""
    if tensor.shape == shape:
        return True
    grown = {"weight": (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())}
    owner, _, leaf = name.rpartition(".")
    return (
        tensor.shape is not None
        and any(skeleton.get_submodule(owner) is module for module in grown.get(leaf, ()))
        and tensor.shape[1:] == shape[1:]
        and tensor.shape[0] > shape[0]
    )


def _misfit(folder: Path, name: str, found: tuple[int, ...] | None, expected: tuple[int, ...]) -> ModelError:
    return ModelError(
        f"{folder}: '{name}' has shape {list(found or ())}, the model has {list(expected)}; "
        "is this the adapter's base?"
    )
