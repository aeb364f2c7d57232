"""The base shared out among processes: each holds a part of every layer and gathers one when it computes it.

FSDP2 on packed bytes, layer by layer. Adapters are in every process, whole: they are small, and so are saved,
summed and stepped as in one process.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from fourbit.config import RunConfig
from fourbit.errors import ConfigError
from fourbit.nn.decoder import layer_list
from fourbit.nn.loss import split_model


def shares_bytes() -> bool:
    """Whether FSDP takes weights that are no floats, as it does from torch 2.12 on."""
    version: Any = torch.__version__  # which compares itself with tuples
    return bool(version >= (2, 12))


def check_shards(config: RunConfig) -> None:
    """Raise ConfigError for settings beside which the base cannot be shared out, and for too old a torch."""
    if not config.train.shard_weights:
        return
    if not shares_bytes():
        raise ConfigError(
            f"train.shard_weights needs torch 2.12 or newer, this is {torch.__version__}: its FSDP takes "
            "floats only"
        )
    if config.lora is None:
        raise ConfigError("train.shard_weights shares out frozen weights; there are none under lora: none")
    if config.model.weight_tier != "device":
        raise ConfigError(
            "train.shard_weights: weights that are shared out are in memory; set model.weight_tier to device"
        )


def shard_base(model: PeftModel, device: torch.device) -> None:
    """Keep this process's part of each layer, on the device; everything else is moved there whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base: Any = model.get_base_model()
    decoder, _ = split_model(base)
    owner, name = layer_list(decoder, base.config.get_text_config().num_hidden_layers)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = getattr(owner, name)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    whole = trained | (set(model.parameters()) - set(layers.parameters()))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # The root of them all, which has no weights of its own to share: layers know then which comes next.
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    for parameter in model.parameters():
        if not hasattr(parameter, "device_mesh"):
            parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
