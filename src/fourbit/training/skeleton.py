"""The model that a run would train, as shapes alone: quantized and adapted on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fourbit.config import RunConfig
from fourbit.model.adapters import add_lora
from fourbit.model.base import (
    check_readable,
    locate,
    make_skeleton,
    quantized_weights,
    read_config,
)
from fourbit.model.formats import bnb, hf, own
from fourbit.model.quantizer import FourBitConfig, pack_left, pack_skeleton


def run_skeleton(
    config: RunConfig, dtype: torch.dtype, layers: int | None = None
) -> PreTrainedModel | PeftModel:
    """What `prepare_model` would give, on the meta device; reads configuration and headers, no weights.

    dtype   of what stays unquantized, and of products
    layers  at most so many decoder layers; None: all
    Raises ModelError or ConfigError as loading would.
    """
    settings, full = config.model, config.lora is None
    place = locate(settings.path, settings.revision)
    found = read_config(place, place.is_file(), settings.trust_remote_code)
    stored = getattr(found, "quantization_config", None)
    check_readable(settings.path, stored)
    if layers is not None:
        text = found.get_text_config()
        text.num_hidden_layers = min(layers, text.num_hidden_layers)
    scheme = None
    if stored is not None:
        if not own.is_own(stored):
            _, scheme = bnb.convert_names(hf.open_folder(place), str(place))
        del found.quantization_config
    with torch.device("meta"):
        kept = torch.float32 if full else dtype
        model: Any = make_skeleton(place, found, settings.trust_remote_code, kept)
        if own.is_own(stored):
            held = own.read_scheme(stored, str(place))
            kind = held.quant_type, held.block_size, held.double_quant
            pack_left(model, FourBitConfig(*kind, dtype, list(held.left)))
        elif scheme is not None:
            packed = {f"{name}.weight" for name in scheme.quantized}
            pack_skeleton(model, packed, scheme.quant_type, scheme.block_size, scheme.double_quant, dtype)
        elif settings.quant_type != "none":
            names = quantized_weights(model)
            pack_skeleton(
                model, names, settings.quant_type, settings.block_size, settings.double_quant, dtype
            )
        model.requires_grad_(full)
        if config.lora is None:
            return model
        return add_lora(model, **config.lora.model_dump(), seed=config.train.seed)
