"""Saving a quantized model as a bitsandbytes 4-bit checkpoint, shard by shard."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourbit.errors import ModelError
from fourbit.model.formats.bnb import bnb_config, to_bnb
from fourbit.model.formats.own import own_config
from fourbit.nn.experts import Experts4bit, experts_modules
from fourbit.nn.linear import Linear4bit, unpacked_linear
from fourbit.nn.packed import packed_parts
from fourbit.private import owner_only

_SHARD_BYTES = 2_000_000_000


def is_bnb_savable(model: nn.Module) -> bool:
    """Whether a bitsandbytes checkpoint can hold all that is packed: layers of a type that it has."""
    return all(
        isinstance(part.module, Linear4bit) and part.module.quant_type in ("nf4", "fp4")
        for part in packed_parts(model)
    )


def left_unpacked(model: nn.Module) -> list[str]:
    """The names of a model's linear layers and experts that are not packed."""
    experts = [name for name, module in experts_modules(model) if not isinstance(module, Experts4bit)]
    return unpacked_linear(model) + experts


def check_savable(quant_type: str) -> None:
    """Raise ModelError for a 4-bit type that a bitsandbytes checkpoint cannot hold."""
    if quant_type not in ("nf4", "fp4"):
        raise ModelError(
            f"{quant_type} cannot be saved: a bitsandbytes checkpoint holds nf4 or fp4 only; "
            "choose one of them"
        )


@owner_only()
def save_quantized(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]
) -> int:
    """Write a model from `fourbit.load` for transformers + bitsandbytes, or fourbit, to load the same bytes.

    A mixture, whose experts bitsandbytes leaves in 16 bits, is written under quant_method "fourbit"
    (`formats.own`). Returns the bytes of weights written. Raises ModelError for INT4 and custom codebooks,
    for a model without 4-bit layers, and when the disk refuses.
    """
    first = next((part.matrices()[0] for part in packed_parts(model)), None)
    if first is None:
        raise ModelError("this model has no 4-bit layer to save; load it with quant_type nf4 or fp4")
    check_savable(first.quant_type)
    left, target = left_unpacked(model), Path(folder)
    if is_bnb_savable(model):
        tensors = checkpoint_tensors(model)
        scheme = bnb_config(first.quant_type, first.double_quant, model.dtype, left)
    else:
        tensors = own_tensors(model)
        scheme = own_config(first.quant_type, first.block_size, first.double_quant, left)
    try:
        target.mkdir(parents=True, exist_ok=True)
        size = _write_shards(tensors, target)
        config = model.config.to_dict()
        config["quantization_config"] = scheme
        config["dtype"] = str(model.dtype).removeprefix("torch.")
        (target / "config.json").write_text(
            json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8"
        )
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))
    except OSError as error:
        raise ModelError(f"{target}: cannot be written ({error.strerror or error})") from error
    return size


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor under the name bitsandbytes and transformers expect; tied weights once."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    tensors: dict[str, Tensor] = {}
    packed = {f"{name}.{leaf}" for name in layers for leaf in ("weight", "weight_absmax", "weight_consts")}
    tied = set(model.all_tied_weights_keys)
    for key, value in model.state_dict().items():
        if key not in packed and key not in tied:
            tensors[key] = value.contiguous()
    for name, layer in layers.items():
        tensors |= to_bnb(f"{name}.weight", layer.quantized())
    return tensors


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor under the model's own name; tied weights once."""
    tied = set(model.all_tied_weights_keys)
    return {key: value.contiguous() for key, value in model.state_dict().items() if key not in tied}


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> int:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    total = sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) == 1:
        save_file(shards[0], str(folder / "model.safetensors"), metadata={"format": "pt"})
        return total
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
