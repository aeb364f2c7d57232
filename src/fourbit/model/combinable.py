"""Which adapters can be combined, and how: everything that is refused, each with its reason."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from fourbit.defaults import CHANGES_BASE
from fourbit.errors import ConfigError, ModelError, nearest
from fourbit.model.adapter_folder import Adapter, LoraFactors

#: Those that add A to A and B to B, and so need one rank; those that end in a singular value decomposition.
BY_FACTOR = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
BY_SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
COMBINATION_TYPES = ("linear", "cat", "svd", *BY_FACTOR[1:], *BY_SVD[1:])
MAJORITY_SIGN_METHODS = ("total", "frequency")

#: Settings of adapters that change more, or otherwise, than by adding B @ A to a weight.
_SPECIAL = {
    "use_dora": "DoRA rescales the whole weight, which no sum of adapters can hold; merge it instead",
    "lora_bias": "it trains biases, which PEFT does not combine",
    "modules_to_save": "it holds whole modules, which PEFT does not combine",
    "trainable_token_indices": "it holds trained tokens, which PEFT does not combine",
    "target_parameters": "it adapts parameters that are no layers, which PEFT does not combine",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts on part of the text only",
    "use_qalora": "it pools its input",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it changes the base weights (KaSA)",
    "monteclora_config": "it draws its weights at random (MonteCLoRA)",
}


@dataclass(frozen=True, slots=True)
class Method:
    """How to combine; None where a method has no use for it (of rank: the largest among the inputs)."""

    combination_type: str
    rank: int | None
    density: float | None
    majority_sign_method: str


def check_method(method: Method, count: int) -> None:
    """Raise ConfigError unless the settings go together and there are adapters enough."""
    name = method.combination_type
    if name not in COMBINATION_TYPES:
        raise ConfigError(
            f"no combination type '{name}'{nearest(name, COMBINATION_TYPES)}; "
            f"there are {', '.join(COMBINATION_TYPES)}"
        )
    if count < 2:
        raise ConfigError("give at least two adapters to combine")
    prunes = name not in ("linear", "cat", "svd")
    if prunes and method.density is None:
        raise ConfigError(f"{name} needs a density, the share of entries that it keeps, such as 0.5")
    if not prunes and method.density is not None:
        raise ConfigError(f"{name} prunes nothing: leave the density out")
    if method.density is not None and not 0 < method.density <= 1:
        raise ConfigError(f"density {method.density:g}: give more than 0 and at most 1")
    if method.rank is not None and name not in BY_SVD:
        raise ConfigError(f"{name} decides the rank itself: leave it out, or use {' or '.join(BY_SVD[:2])}")
    if method.rank is not None and method.rank < 1:
        raise ConfigError(f"rank {method.rank}: give at least 1")
    if method.majority_sign_method not in MAJORITY_SIGN_METHODS:
        raise ConfigError(
            f"majority sign method '{method.majority_sign_method}': give {' or '.join(MAJORITY_SIGN_METHODS)}"
        )
    if method.majority_sign_method != "total" and "ties" not in name:
        raise ConfigError(f"{name} elects no signs: leave the majority sign method out")


def check_adapters(adapters: Sequence[Adapter], method: Method, same_base: bool) -> None:
    """Raise ModelError unless the method can combine these; same_base: names of bases do not count."""
    for adapter in adapters:
        _check_special(adapter)
    first, *others = adapters
    for other in others:
        bases = [str(adapter.config.get("base_model_name_or_path")) for adapter in (first, other)]
        if not same_base and not _same_place(*bases):
            raise ModelError(
                f"{first.folder} is made for {bases[0]} and {other.folder} for {bases[1]}: adapters of "
                "different bases cannot be combined; if both are one model, say so (same base)"
            )
    seen: dict[str, tuple[Adapter, LoraFactors]] = {}
    for adapter in adapters:
        for name, layer in adapter.layers.items():
            known, before = seen.setdefault(name, (adapter, layer))
            shapes = [(found.b.shape[0], found.a.shape[1]) for found in (before, layer)]
            if shapes[0] != shapes[1]:
                raise ModelError(
                    f"'{name}' is {_by(shapes[0])} in {known.folder} and {_by(shapes[1])} in "
                    f"{adapter.folder}: these adapters belong to different bases"
                )
            if method.combination_type in BY_FACTOR and before.rank != layer.rank:
                raise ModelError(
                    f"'{name}' has rank {before.rank} in {known.folder} and {layer.rank} in "
                    f"{adapter.folder}, and {method.combination_type} needs one rank; use cat or svd"
                )


def _check_special(adapter: Adapter) -> None:
    for key, reason in _SPECIAL.items():
        if adapter.config.get(key):
            raise ModelError(f"{adapter.folder}: cannot be combined ({key}): {reason}")
    start = str(adapter.config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise ModelError(
            f"{adapter.folder}: cannot be combined: its initialisation ({start}) changed the base; "
            "convert it to plain LoRA first (PEFT's path_initial_model_for_weight_conversion)"
        )
    if adapter.others:
        raise ModelError(
            f"{adapter.folder}: cannot be combined: it holds '{adapter.others[0]}', no LoRA factor"
        )
    if not adapter.layers:
        raise ModelError(f"{adapter.folder}: holds no LoRA layer")


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _same_place(one: str, other: str) -> bool:
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))
