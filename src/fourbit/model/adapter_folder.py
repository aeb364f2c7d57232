"""PEFT adapter folders read without their base: settings, layers, ranks, sizes."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourbit.errors import ModelError
from fourbit.limits import LimitError, limited, parse_json
from fourbit.model.finite import check_stored

CONFIG = "adapter_config.json"
WEIGHTS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"
#: What PEFT puts before the name of a module, and after it: the factors of linear layers and of embeddings.
PREFIX = "base_model.model."
FACTORS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The change that an adapter makes to one layer: scaling * B @ A.

    a          [r, in]   of an embedding, [r, number of embeddings]; of E experts [r E, in]
    b          [out, r]  of E experts [out, r E]
    scaling    alpha / r, or alpha / sqrt(r) with rsLoRA
    embedding  whether the layer is an embedding, whose weight is the transpose of the product
    """

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter in memory, on the CPU, in the precision in which it is stored.

    config  adapter_config.json
    layers  by name of the module in the base
    others  names of tensors that are no factors: DoRA magnitudes, biases, saved modules, trained tokens
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, LoraFactors]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What a person wants to know of an adapter; of one that is not LoRA, ranks and alpha are empty.

    ranks       the different ranks of its layers, ascending
    alpha       lora_alpha; alphas of single layers may differ where `patterns` is true
    targets     endings of the names of its layers
    saved       modules that it holds whole
    bytes       of the weights file
    """

    folder: str
    variant: str
    base: str | None
    ranks: tuple[int, ...]
    alpha: float | None
    patterns: bool
    targets: tuple[str, ...]
    saved: tuple[str, ...]
    parameters: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_adapters(folder: str | os.PathLike[str]) -> list[Path]:
    """Adapter folders at or below a folder, in order. Those in a run's checkpoints are left out, unless the
    folder itself lies there.

    Raises ModelError if there is no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        raise ModelError(f"{top}: no such folder")
    found = sorted(file.parent for file in top.rglob(CONFIG))
    return [path for path in found if "checkpoints" not in path.relative_to(top).parts]


def adapter_at(place: str | os.PathLike[str]) -> Path:
    """The adapter folder that a place means: the folder itself, or that of a run. Raises ModelError."""
    for path in (Path(place), Path(place) / "adapter"):
        if (path / CONFIG).exists():
            return path
    raise ModelError(
        f"{place}: no adapter here ({CONFIG} is missing); give a run folder or an adapter folder"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ModelError."""
    try:
        config = parse_json((folder / CONFIG).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{folder}: no adapter here ({CONFIG} is missing)") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG}: not a table of settings")
    return config


def read_adapter(folder: Path) -> Adapter:
    """A LoRA adapter with its weights.

    Raises ModelError for another method, for weights that cannot be read, and where settings and weights
    disagree.
    """
    config = read_config(folder)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder}: a {config.get('peft_type', 'nameless')} adapter; only LoRA is understood"
        )
    tensors = _read_weights(folder)
    layers = dict(_layers(folder, config, tensors))
    used = {
        f"{PREFIX}{name}.{ending}" for name, layer in layers.items() for ending in FACTORS[layer.embedding]
    }
    return Adapter(folder, config, layers, tuple(name for name in tensors if name not in used))


def summarize(folder: Path) -> AdapterSummary:
    """An adapter's summary; its weights are not read. Raises ModelError."""
    config, shapes = read_config(folder), _read_shapes(folder)
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or (), list | tuple | dict):
            raise ModelError(f"{folder / CONFIG}: {key} is {config[key]!r}, not a list or table")
    factors = {
        name.removeprefix(PREFIX).removesuffix(f".{ending}"): shape[0]
        for name, shape in shapes.items()
        for ending in (FACTORS[False][0], FACTORS[True][0])
        if name.endswith(f".{ending}")
    }
    return AdapterSummary(
        folder=str(folder),
        variant=_variant(config),
        base=config.get("base_model_name_or_path"),
        ranks=tuple(sorted(set(factors.values()))),
        alpha=config.get("lora_alpha"),
        patterns=bool(config.get("rank_pattern") or config.get("alpha_pattern")),
        targets=tuple(sorted({name.rsplit(".", 1)[-1] for name in factors})),
        saved=tuple(config.get("modules_to_save") or ()),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        bytes=weights_file(folder).stat().st_size,
    )


def _variant(config: dict[str, Any]) -> str:
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    names = [name for key, name in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if config.get(key)]
    return ", ".join(names) or "LoRA"


def weights_file(folder: Path) -> Path:
    """The adapter's safetensors file. Raises ModelError; pickled weights are never loaded."""
    file = folder / WEIGHTS
    if not file.exists():
        pickled = (folder / _PICKLED).exists()
        hint = "only pickled weights, which are never loaded" if pickled else "the weights are missing"
        raise ModelError(f"{file}: {hint}; save the adapter as safetensors")
    return file


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = weights_file(folder)
    try:
        with safe_open(str(file), framework="pt") as stored:
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error})") from None
    for name, tensor in weights.items():
        check_stored(tensor, f"{file}: '{name}'")
    return weights


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    file = weights_file(folder)
    try:
        with safe_open(str(file), framework="pt") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error})") from None


def _layers(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> Iterator[tuple[str, LoraFactors]]:
    for key in tensors:
        for embedding, (ending, other) in FACTORS.items():
            if not key.endswith(f".{ending}"):
                continue
            name = key.removeprefix(PREFIX).removesuffix(f".{ending}")
            b = tensors.get(f"{PREFIX}{name}.{other}")
            a = tensors[key]
            rank, scaling = rank_and_scaling(folder, config, name)
            # Those of a stack of experts have all its experts' ranks; how many there are only a model says.
            wanted = a.shape[0] if config.get("target_parameters") and a.dim() == 2 else rank
            if b is None or a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == wanted:
                found = f"A {list(a.shape)}, B {list(b.shape) if b is not None else 'missing'}"
                raise ModelError(f"{folder}: '{name}' does not fit its settings, rank {rank:g}: {found}")
            yield name, LoraFactors(a, b, scaling, embedding)


def rank_and_scaling(folder: Path, config: dict[str, Any], name: str) -> tuple[int, float]:
    """A layer's rank r, and alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732).

    Raises ModelError.
    """
    rank = _of_layer(folder, config, "rank_pattern", "r", name)
    alpha = _of_layer(folder, config, "alpha_pattern", "lora_alpha", name)
    if rank < 1 or rank != int(rank):
        raise ModelError(f"{folder / CONFIG}: the rank of '{name}' is {rank:g}")
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(folder: Path, config: dict[str, Any], patterns: str, default: str, name: str) -> float:
    """A setting of one layer, by PEFT's rule: the first pattern that matches, else the adapter's own."""
    try:
        found = config.get(patterns) or {}
        with limited():
            key = get_pattern_key(list(found), name)
        value = float(found.get(key, config[default]))
    except (LimitError, re.error, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{folder / CONFIG}: no {default} for '{name}' can be read ({error})") from None
    if not 0 <= value < math.inf:
        raise ModelError(f"{folder / CONFIG}: {default} of '{name}' is {value}")
    return value


def unwrapped(name: str) -> str:
    """A module's name without PEFT's wrappers: experts have one for each adapted stack, one in another."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def rank_of(layers: Iterable[LoraFactors]) -> int:
    """The largest rank among layers."""
    return max(layer.rank for layer in layers)


def write_adapter(folder: Path, config: dict[str, Any], layers: dict[str, LoraFactors]) -> None:
    """Write factors, already scaled as the config says, in PEFT's format. Raises ModelError."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a, b = FACTORS[layer.embedding]
        tensors[f"{PREFIX}{name}.{a}"] = layer.a.to(torch.float32).contiguous()
        tensors[f"{PREFIX}{name}.{b}"] = layer.b.to(torch.float32).contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written ({error.strerror or error})") from error
