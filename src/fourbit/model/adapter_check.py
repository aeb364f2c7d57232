"""Whether an adapter belongs to a base, found out before PEFT builds what the adapter's settings claim.

PEFT makes matrices of the ranks in adapter_config.json before it opens the weights, matches that file's
patterns with every module, and passes over weights that have no place in the model or are missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fourbit.errors import ModelError
from fourbit.limits import LimitError, limited
from fourbit.model.adapter_folder import CONFIG, LoraFactors, read_adapter, unwrapped

#: Ranks that people train with, which may stand in the settings though no layer has them.
_USUAL_RANK = 256
#: Iterations of PiSSA's fast initialisation; PEFT's documents use 16.
_MOST_ITERATIONS = 100


def check_adapter(folder: Path, model: nn.Module) -> set[str]:
    """The names of the layers that are stored.

    Raises ModelError for damaged weights, absurd settings, and layers that the model does not have.
    """
    adapter = read_adapter(folder)
    base = _base(model)
    _check_settings(folder, adapter.config, adapter.layers)
    _check_patterns(folder, adapter.config, [name for name, _ in base.named_modules()])
    for name, layer in adapter.layers.items():
        try:
            module = base.get_submodule(unwrapped(name))
        except AttributeError:
            raise ModelError(f"{folder}: this adapter does not fit the model: it has no '{name}'") from None
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        wanted = (layer.b.shape[0], layer.a.shape[1])
        if isinstance(module, nn.Linear) and (module.out_features, module.in_features) != wanted:
            raise ModelError(
                f"{folder}: this adapter does not fit the model: '{name}' is "
                f"[{module.out_features}, {module.in_features}], the adapter is for {list(wanted)}"
            )
    return set(adapter.layers)


def check_complete(folder: Path, model: PeftModel, name: str, stored: set[str]) -> None:
    """Raise ModelError for layers that got an adapter by the settings though none is `stored` for them."""
    for layer, module in _base(model).named_modules():
        if not isinstance(module, LoraLayer) or layer in stored:
            continue
        if name in module.lora_A or name in module.lora_embedding_A:
            raise ModelError(f"{folder}: this adapter does not fit the model: it has nothing for '{layer}'")


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_settings(folder: Path, config: dict[str, Any], layers: dict[str, LoraFactors]) -> None:
    largest = max((_USUAL_RANK, *(layer.rank for layer in layers.values())))
    for rank in (config.get("r"), *(config.get("rank_pattern") or {}).values()):
        if type(rank) is not int or not 1 <= rank <= largest:
            raise ModelError(
                f"{folder / CONFIG}: names the rank {rank}, and none that is stored is over {largest}"
            )
    if config.get("megatron_config"):
        raise ModelError(f"{folder / CONFIG}: names a package to import (megatron_core): not supported")
    if config.get("layer_replication"):
        raise ModelError(f"{folder / CONFIG}: repeats layers of the base (layer_replication): not supported")
    found = re.fullmatch(r"pissa_niter_(\d+)", str(config.get("init_lora_weights")))
    if found and int(found.group(1)) > _MOST_ITERATIONS:
        raise ModelError(f"{folder / CONFIG}: {found.group()} would take long; give up to {_MOST_ITERATIONS}")


def _check_patterns(folder: Path, config: dict[str, Any], names: list[str]) -> None:
    """Try every pattern with every module, in limited time: PEFT will, without a limit."""
    for pattern in _patterns(config):
        try:
            with limited():
                for name in names:
                    re.match(rf"(.*\.)?({pattern})$", name)
        except (LimitError, re.error, RecursionError, OverflowError) as error:
            raise ModelError(f"{folder / CONFIG}: the pattern {pattern!r} cannot be used ({error})") from None


def _patterns(config: dict[str, Any]) -> Iterator[str]:
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        yield from [value] if isinstance(value, str) else map(str, value or ())
    for key in ("rank_pattern", "alpha_pattern"):
        yield from config.get(key) or {}
