"""PEFT adapter folders read without their base: settings, layers, ranks, sizes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor

from fourbit.errors import ModelError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
#: What PEFT puts before the name of a module, and after it: the factors of linear layers and of embeddings.
PREFIX = "base_model.model."
FACTORS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The change that an adapter makes to one layer: scaling * B @ A.

    a          [r, in]   of an embedding, [r, number of embeddings]
    b          [out, r]
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
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
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
    """An adapter's summary, its weights read only where their file is not safetensors. Raises ModelError."""
    config, shapes = read_config(folder), _read_shapes(folder)
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
        bytes=_weights_file(folder).stat().st_size,
    )


def _variant(config: dict[str, Any]) -> str:
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    names = [name for key, name in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if config.get(key)]
    return ", ".join(names) or "LoRA"


def _weights_file(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    raise ModelError(f"{folder}: no weights here ({WEIGHTS[0]} is missing)")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = _weights_file(folder)  # without it PEFT would take the path for a name on the hub
    try:
        weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        # Whatever a damaged file provokes: safetensors, pickle and zip each raise their own.
        raise ModelError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    return weights


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    file = _weights_file(folder)
    if file.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in _read_weights(folder).items()}
    try:
        with safe_open(str(file), framework="pt") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
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
            rank = _of_layer(config, "rank_pattern", "r", name)
            if b is None or a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
                found = f"A {list(a.shape)}, B {list(b.shape) if b is not None else 'missing'}"
                raise ModelError(f"{folder}: '{name}' does not fit its settings, rank {rank:g}: {found}")
            alpha = _of_layer(config, "alpha_pattern", "lora_alpha", name)
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            yield name, LoraFactors(a, b, scaling, embedding)


def _of_layer(config: dict[str, Any], patterns: str, default: str, name: str) -> float:
    """A setting of one layer, by PEFT's rule: the first pattern that matches, else the adapter's own."""
    found = config.get(patterns) or {}
    return float(found.get(get_pattern_key(list(found), name), config[default]))


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
        save_file(tensors, str(folder / WEIGHTS[0]), metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written ({error.strerror or error})") from error
