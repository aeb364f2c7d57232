"""Attaching, saving and loading LoRA adapters: PEFT's, with fourbit's layer in them."""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft.tuners.lora.model as peft_lora
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourbit.defaults import LORA_ALPHA, LORA_DROPOUT, LORA_R
from fourbit.errors import ConfigError, ModelError, nearest
from fourbit.memory.stream import stream_of
from fourbit.model.adapter_check import check_adapter, check_complete
from fourbit.nn.dropout import KeySource
from fourbit.nn.experts import STACKS, Experts4bit, experts_modules
from fourbit.nn.linear import Linear4bit
from fourbit.nn.lora import LoraLinear
from fourbit.nn.lora_experts import LoraExperts
from fourbit.nn.packed import packed_parts

_ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "attn.c_proj",
    "out_proj",
    "dense",
)


#: Names of experts' matrices in transformers 4, which PEFT turns into those of today's stacks.
_MEANING_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def add_lora(
    model: PreTrainedModel,
    r: int = LORA_R,
    alpha: float = LORA_ALPHA,
    dropout: float = LORA_DROPOUT,
    target_modules: str | Sequence[str] = "all-linear",
    rslora: bool = False,
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
    **peft_options: Any,
) -> PeftModel:
    """Put a trainable LoRA adapter on a frozen base; its weights are fp32, B is zero.

    target_modules  "all-linear" (every linear layer but the head, and all experts), "attention", or names:
                    endings of names of layers or of stacks of experts, or regular expressions over them
    peft_options    further settings of `peft.LoraConfig`, such as rank_pattern or use_dora

    Raises ConfigError for a rank below 1, and for targets or modules to save that match nothing.
    """
    if r < 1:
        raise ConfigError(f"lora.r = {r}: a rank is at least 1 (8 to 16 suit small models)")
    _check_saved(model, modules_to_save)
    targets = _targets(model, target_modules)
    if targets.stacks and dropout:
        raise ConfigError(
            f"lora.dropout = {dropout:g}: PEFT has no dropout for experts; set lora.dropout to 0, or "
            "lora.target_modules to attention"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only divides it by r: any number will do
        lora_dropout=dropout,
        target_modules=targets.modules,
        target_parameters=targets.stacks or None,
        use_rslora=rslora,
        modules_to_save=list(modules_to_save) or None,
        # A trained embedding and the head tied to it must stay one matrix.
        ensure_weight_tying=bool(modules_to_save) and bool(model.config.tie_word_embeddings),
        task_type="CAUSAL_LM",
        **peft_options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with _fourbit_layers():
                adapted = get_peft_model(model, config)
        except ConfigError:
            raise
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"lora.target_modules: {reason}") from None
    return _wire(adapted)


def load_adapter(
    model: PreTrainedModel | PeftModel,
    folder: str | os.PathLike[str],
    trainable: bool = False,
    name: str = "default",
) -> PeftModel:
    """Put a saved PEFT adapter on its base, under a name; on a model that has one, it stays off at first.

    Raises ModelError naming the folder when it does not fit.
    """
    stored = check_adapter(Path(folder), model)
    try:
        with _fourbit_layers():
            if isinstance(model, PeftModel):
                model.load_adapter(os.fspath(folder), name, is_trainable=trainable)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(
                    model, os.fspath(folder), adapter_name=name, is_trainable=trainable
                )
    except Exception as error:  # strange settings make PEFT raise every class there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{folder}: this adapter does not fit the model ({reason})") from error
    check_complete(Path(folder), adapted, name, stored)
    return _wire(adapted)


def key_source(model: nn.Module) -> KeySource | None:
    """The dropout keys that all adapter layers of a model share, or None without an adapter."""
    return next((layer.key_source for layer in _layers(model)), None)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. A packed weight counts its real number of weights, not its bytes."""
    packed = dict[int, int]()
    for part in packed_parts(model):
        packed |= {id(part.codes): part.weights} | {id(scales): 0 for scales in part.scales}
    counts = [(p.requires_grad, packed.get(id(p), p.numel())) for p in model.parameters()]
    return sum(n for trainable, n in counts if trainable), sum(n for _, n in counts)


@cache
def register_layers() -> None:
    """From now on PEFT builds `LoraLinear` for every packed layer, whoever asks it to.

    PEFT keeps its table of custom layers on a config object and does not save it, so an adapter loaded by
    PEFT alone would get a layer that cannot merge. Wrapping its last dispatcher needs no table.
    """
    peft_lora.dispatch_default = _dispatcher(peft_lora.dispatch_default, lambda base: False)


def _dispatcher(original: Callable[..., Any], also: Callable[[nn.Module], bool]) -> Callable[..., Any]:
    """PEFT's way to the layer for a target, but ours for packed ones and others."""

    def dispatch(
        target: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        parameter_name: str | None = None,
        **options: Any,
    ) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is not None and isinstance(base, Experts4bit):
            return LoraExperts(target, adapter_name, parameter_name, config=config, **options)
        if parameter_name is None and (isinstance(base, Linear4bit) or also(base)):
            if config.fan_in_fan_out:  # an adapter of a Conv1D, which these layers are not
                config = copy(config)
                config.fan_in_fan_out = False
            return LoraLinear(base, adapter_name, config=config, **options)
        return original(target, adapter_name, config, parameter_name, **options)

    return dispatch


@contextmanager
def _fourbit_layers() -> Iterator[None]:
    """Within this block PEFT builds `LoraLinear` for every linear layer."""
    original = peft_lora.dispatch_default
    peft_lora.dispatch_default = _dispatcher(original, lambda base: type(base) is nn.Linear)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers in words that transformers has deprecated since.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # An error of ours says it (model.adapter_check).
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            yield
    finally:
        peft_lora.dispatch_default = original


def _wire(model: PeftModel) -> PeftModel:
    """Give all adapter layers one source of dropout keys, and each its own key from its name."""
    stream = stream_of(model)
    if stream is not None:  # PEFT puts adapters where the packed weights are
        for parameter in model.parameters():
            if parameter.dtype != torch.uint8:
                parameter.data = parameter.data.to(stream.device)
    source = KeySource()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLinear):
            module.layer_key = zlib.crc32(name.encode())
            module.key_source = source
    return model


def _layers(model: nn.Module) -> Iterator[LoraLinear]:
    return (module for module in model.modules() if isinstance(module, LoraLinear))


@dataclass(frozen=True)
class _Targets:
    """What gets an adapter, as PEFT takes it: modules, and parameters that are stacks of experts."""

    modules: str | list[str]
    stacks: list[str] = field(default_factory=list)


def _targets(model: PreTrainedModel, wanted: str | Sequence[str]) -> _Targets:
    stacks = sorted(f"{name}.{leaf}" for name, _ in experts_modules(model) for leaf in STACKS)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if wanted == "all-linear":
        return _Targets(_beside_experts(model, names) if stacks else "all-linear", stacks)
    selected = _selected(names, stacks, wanted)
    return _Targets([name for name in selected if name not in stacks], [n for n in selected if n in stacks])


def _beside_experts(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The linear layers of a mixture but its head, by the endings of their names.

    PEFT takes names that experts' matrices had in earlier versions of transformers to mean the experts, so
    layers with such names (shared experts, dense layers) cannot be told from them in an adapter's settings.
    """
    head = model.get_output_embeddings()
    endings = {name.rsplit(".", 1)[-1] for name in names if model.get_submodule(name) is not head}
    return sorted(endings - set(_MEANING_EXPERTS))


def _selected(names: list[str], stacks: list[str], wanted: str | Sequence[str]) -> list[str]:
    """Names of stacks, and names or endings of names of linear layers."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in (*names, *stacks)})
    if wanted == "attention":
        found = [
            ending
            for ending in _ATTENTION
            if any(
                (n.endswith(f".{ending}") and "attn" in n) or n.endswith(f"attention.{ending}") for n in names
            )
        ]
        if not found:
            raise ConfigError(
                f"lora.target_modules = 'attention': found no attention layers among {', '.join(endings)}"
            )
        return found
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    selected: list[str] = []
    for pattern in patterns:
        if any(_ends(name, pattern) for name in names):
            selected.append(pattern)
            continue
        matched = [name for name in stacks if _ends(name, pattern)] or _match(pattern, [*names, *stacks])
        if not matched:
            raise ConfigError(
                f"lora.target_modules: '{pattern}' matches no layer{nearest(pattern, endings)}; "
                f"linear layers end in {', '.join(endings)}"
            )
        selected += matched
    return sorted(set(selected))


def _check_saved(model: PreTrainedModel, wanted: Sequence[str]) -> None:
    """PEFT passes over a name that it does not find."""
    names = [name for name, _ in model.named_modules() if name]
    for name in wanted:
        if not any(_ends(other, name) for other in names):
            hint = nearest(name, {other.rsplit(".", 1)[-1] for other in names})
            raise ConfigError(
                f"lora.modules_to_save: '{name}' matches no module{hint}; "
                "give endings of names, such as embed_tokens or lm_head"
            )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _match(pattern: str, names: list[str]) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"lora.target_modules: '{pattern}' is not a valid pattern ({error})") from None
