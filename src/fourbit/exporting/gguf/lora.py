"""An adapter alone as a GGUF file, which llama.cpp applies to the base's file when it loads.

llama.cpp scales every product by alpha over the rank of its matrices, one alpha for the whole file. What
an adapter says beyond that (rank-stabilized scaling, ranks and alphas by layer) is folded into B.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig
from transformers import PretrainedConfig

from fourbit.defaults import CHANGES_BASE
from fourbit.errors import ModelError
from fourbit.exporting.gguf import architecture
from fourbit.exporting.gguf.write import file_names, parameter_shapes, written_aside
from fourbit.model.adapter_folder import LoraFactors, read_adapter, read_config


def write_lora_gguf(
    adapter_folder: str | os.PathLike[str], config: PretrainedConfig, path: str | os.PathLike[str]
) -> Path:
    """Write a PEFT LoRA adapter for llama.cpp, fp32.

    config: of the base model. Raises ModelError for what a LoRA file cannot hold: DoRA, whole modules or
    embeddings that were trained, biases, layers that the base's file does not have.
    """
    folder, target = Path(adapter_folder), Path(path)
    arch = architecture.architecture(config)
    alpha = _read_alpha(folder)
    layers = _read_layers(folder)
    names = file_names(arch, config)
    if config.tie_word_embeddings and "lm_head" in layers:
        raise _refused(folder, "it adapts lm_head, which is the embedding in this model")
    _check_base(folder, layers, config)
    with written_aside(target) as partial:
        _write(partial, folder, alpha, layers, names, config, arch)
    return target


def _write(
    path: Path,
    folder: Path,
    alpha: float,
    layers: dict[str, LoraFactors],
    names: Callable[[str], str],
    config: PretrainedConfig,
    arch: architecture.Architecture,
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch.name)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(folder.resolve().name)
        for module, layer in layers.items():
            # So that alpha / rank, by which llama.cpp multiplies, makes it the layer's own scaling.
            a, b = layer.a.float(), layer.b.float() * (layer.scaling * layer.rank / alpha)
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


def _read_alpha(folder: Path) -> float:
    read_config(folder)  # PEFT would take a folder without one for a name on the hub
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
            str(adapter.init_lora_weights).lower().startswith(CHANGES_BASE)
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise _refused(folder, reason)
    return float(adapter.lora_alpha)


def _read_layers(folder: Path) -> dict[str, LoraFactors]:
    adapter = read_adapter(folder)
    strange = [*adapter.others, *(name for name, layer in adapter.layers.items() if layer.embedding)]
    if strange:
        raise _refused(folder, f"it holds '{strange[0]}', which is not part of a linear layer's LoRA")
    if not adapter.layers:
        raise _refused(folder, "it is empty")
    return adapter.layers


def _check_base(folder: Path, layers: dict[str, LoraFactors], config: PretrainedConfig) -> None:
    shapes = parameter_shapes(config)
    for module, layer in layers.items():
        found, wanted = (layer.b.shape[0], layer.a.shape[1]), shapes.get(f"{module}.weight")
        if found != wanted:
            there = f"is {list(wanted)} there" if wanted else "is not there"
            raise ModelError(
                f"{folder}: does not fit this base: it adapts '{module}' of {list(found)}, which {there}"
            )


def _refused(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"{folder}: cannot be a LoRA GGUF: {reason}; merge it into the base and export that instead"
    )
