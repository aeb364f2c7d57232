"""An adapter alone as a GGUF file, which llama.cpp applies to the base's file when it loads.

llama.cpp scales every product by alpha over the rank of its matrices, one alpha for the whole file. What
an adapter says beyond that (rank-stabilized scaling, ranks and alphas by layer) is folded into B.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from fourbit.errors import ModelError
from fourbit.exporting.gguf import architecture
from fourbit.exporting.gguf.write import file_names, parameter_shapes, written_aside
from fourbit.model.adapter_folder import read_adapter, weights_file

_PREFIX = "base_model.model."
# Initializations that change the base's weights: the adapter then belongs to the changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def write_lora_gguf(
    adapter_folder: str | os.PathLike[str], config: PretrainedConfig, path: str | os.PathLike[str]
) -> Path:
    """Write a PEFT LoRA adapter for llama.cpp, fp32.

    config: of the base model. Raises ModelError for what a LoRA file cannot hold: DoRA, whole modules or
    embeddings that were trained, biases, layers that the base's file does not have.
    """
    folder, target = Path(adapter_folder), Path(path)
    arch = architecture.architecture(config)
    adapter = _read_config(folder)
    pairs = _read_pairs(folder)
    names = file_names(arch, config)
    if config.tie_word_embeddings and "lm_head" in pairs:
        raise _refused(folder, "it adapts lm_head, which is the embedding in this model")
    _check_base(folder, pairs, config)
    read_adapter(folder)  # raises where ranks, alphas or values cannot be
    with written_aside(target) as partial:
        _write(partial, folder, adapter, pairs, names, config, arch)
    return target


def _write(
    path: Path,
    folder: Path,
    adapter: LoraConfig,
    pairs: dict[str, dict[str, Tensor]],
    names: Callable[[str], str],
    config: PretrainedConfig,
    arch: architecture.Architecture,
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch.name)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(adapter.lora_alpha))
        writer.add_name(folder.resolve().name)
        for module, pair in pairs.items():
            a, b = pair["A"].float(), pair["B"].float()
            b = b * _fold(adapter, module, rank=a.shape[0])
            heads = architecture.query_heads(f"{module}.weight", config, arch)
            if heads:
                b = architecture.interleave(b, heads)
            name = names(f"{module}.weight")
            writer.add_tensor(f"{name}.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _fold(adapter: LoraConfig, module: str, rank: int) -> float:
    """What B is multiplied by, so that lora_alpha / rank of it is the module's own scaling."""
    alphas = adapter.alpha_pattern or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), module), adapter.lora_alpha))
    own = alpha / rank**0.5 if adapter.use_rslora else alpha / rank
    return own * rank / float(adapter.lora_alpha)


def _read_config(folder: Path) -> LoraConfig:
    if not (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: no adapter here (adapter_config.json is missing)")
    try:
        adapter = LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # strange settings make PEFT raise every class there is
        raise ModelError(f"{folder}: adapter_config.json cannot be read ({error})") from error
    if not isinstance(adapter, LoraConfig):
        raise _refused(folder, "it is not a LoRA adapter")
    reasons = {
        "it is a DoRA adapter, whose magnitudes have no place there": adapter.use_dora,
        "it holds whole trained modules (modules_to_save)": adapter.modules_to_save,
        "it holds trained token embeddings": getattr(adapter, "trainable_token_indices", None),
        "it trained biases": adapter.bias != "none" or getattr(adapter, "lora_bias", False),
        "it adapts parameters that are not linear layers": getattr(adapter, "target_parameters", None),
        "its weights are stored transposed (fan_in_fan_out)": adapter.fan_in_fan_out,
        "its alpha is 0": not adapter.lora_alpha,
        f"it was initialized by {adapter.init_lora_weights}, which changed the base's weights": (
            str(adapter.init_lora_weights).lower().startswith(_CHANGES_BASE)
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise _refused(folder, reason)
    return adapter


def _read_pairs(folder: Path) -> dict[str, dict[str, Tensor]]:
    file = weights_file(folder)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read ({error})") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, values in tensors.items():
        module, dot, part = name.removeprefix(_PREFIX).partition(".lora_")
        side = part.removesuffix(".weight")
        if not dot or side not in ("A", "B"):
            raise _refused(folder, f"it holds '{name}', which is not part of a linear layer's LoRA")
        pairs.setdefault(module, {})[side] = values
    if not pairs:
        raise _refused(folder, "it is empty")
    return pairs


def _check_base(folder: Path, pairs: dict[str, dict[str, Tensor]], config: PretrainedConfig) -> None:
    shapes = parameter_shapes(config)
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ModelError(f"{folder}: '{module}' lacks lora_{'B' if 'A' in pair else 'A'}; train again")
        found = (*pair["B"].shape[:-1], *pair["A"].shape[1:])
        wanted = shapes.get(f"{module}.weight")
        if found != wanted:
            there = f"is {list(wanted)} there" if wanted else "is not there"
            raise ModelError(
                f"{folder}: does not fit this base: it adapts '{module}' of {list(found)}, which {there}"
            )


def _refused(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"{folder}: cannot be a LoRA GGUF: {reason}; merge it into the base and export that instead"
    )
