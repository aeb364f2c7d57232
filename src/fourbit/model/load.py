"""`fourbit.load`: a Hugging Face folder or name, a bitsandbytes 4-bit checkpoint, or a GGUF file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from fourbit.errors import ConfigError, ModelError
from fourbit.memory.mapped import MappedFile
from fourbit.memory.stream import stream_from_host, stream_weights
from fourbit.model import tokenizer as tokenizers
from fourbit.model.base import (
    canonical_name,
    check_fit,
    check_readable,
    guard,
    locate,
    make_skeleton,
    open_weights,
    packed_shapes,
    quantized_weights,
    read_config,
)
from fourbit.model.compute import choose_compute_dtype, choose_device
from fourbit.model.finite import check_model
from fourbit.model.formats import bnb, gguf, hf, own
from fourbit.model.formats.lazy import LazyTensor, OriginalTensor
from fourbit.model.packed_folder import open_own
from fourbit.model.quantizer import FourBitConfig, experts_names, linear_names
from fourbit.model.save import left_unpacked
from fourbit.model.sizes import check_total
from fourbit.nn.decoder import layer_list
from fourbit.nn.linear import Linear4bit
from fourbit.nn.loss import split_model
from fourbit.nn.packed import packed_parts

_DISK = (
    "{path}: weights can stay on the disk only on a CPU, and only those of a 4-bit checkpoint, whose bytes "
    "are used where they lie; make one with `fourbit quantize {path} FOLDER`, or set model.weight_tier to "
    "device"
)


@dataclass(frozen=True)
class LoadReport:
    """What a load did, kept on the model as `fourbit_report`."""

    source: str
    quant_type: str
    converted: int
    experts: int  # matrices of experts in 4 bits
    left: tuple[str, ...]  # linear layers and experts that stayed as they were
    rest_dtype: torch.dtype
    weight_bytes: int
    bits_per_weight: float
    compute_reason: str
    parameters: int

    def line(self) -> str:
        rest = str(self.rest_dtype).removeprefix("torch.")
        left = (
            f"left {_few(self.left)}, embeddings and norms in {rest}"
            if self.left
            else f"embeddings and norms in {rest}"
        )
        size = f"{self.parameters / 1e6:,.0f} M parameters in {self.weight_bytes / 1e6:,.0f} MB"
        experts = f" and {self.experts:,} matrices of experts" if self.experts else ""
        if not self.converted:
            return f"{self.source}: {size}, nothing quantized ({rest})"
        return (
            f"{self.source}: {self.converted} linear layers{experts} in {self.quant_type} "
            f"({self.bits_per_weight:.3f} bits per weight), {left}; {size}"
        )


@gguf.read_once()
def load(
    path: str | os.PathLike[str],
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    compute_dtype: str = "auto",
    device: str = "auto",
    weight_tier: str = "device",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model with its linear layers in 4 bits, and its tokenizer.

    path           a folder with safetensors, a hub name, a bitsandbytes 4-bit checkpoint, or a .gguf file
    quant_type     "nf4", "fp4", "int4", or "none" for the 16-bit model; a 4-bit checkpoint keeps its own
    compute_dtype  "auto", "bfloat16", "float32", "float16": dtype of products and of what stays unquantized

    weight_tier    "device"; "host": packed weights stay in memory beside a GPU, which holds two layers' at a
                   time; or "disk": those of a 4-bit checkpoint stay in its file, of which one layer is in
                   memory at a time (CPU). Training needs activation checkpointing with both.

    Weights are read one at a time: the peak is what stays plus one tensor in its stored precision.
    The model is in evaluation mode, frozen, and carries a LoadReport as `fourbit_report`.
    Raises ModelError or ConfigError in one line.
    """
    target = choose_device(device)
    compute = choose_compute_dtype(compute_dtype, target)
    source = locate(os.fspath(path), revision)
    is_gguf = source.is_file()
    config = read_config(source, is_gguf, trust_remote_code)
    tokenizer = _read_tokenizer(source, trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    check_readable(os.fspath(path), stored)
    if weight_tier not in ("device", "host", "disk"):
        raise ConfigError(f"weight_tier '{weight_tier}': must be device, host or disk")
    if weight_tier == "host" and (target.type == "cpu" or (stored is None and quant_type == "none")):
        raise ConfigError(
            f"{os.fspath(path)}: only packed weights stay in host memory, and only beside a GPU; set "
            "model.weight_tier to device"
        )
    mapped: list[MappedFile] | None = [] if weight_tier == "disk" else None
    if mapped is not None and (stored is None or target.type != "cpu"):
        raise ConfigError(_DISK.format(path=os.fspath(path)))
    tensors, settings = _open(
        source, config, is_gguf, quant_type, double_quant, block_size, trust_remote_code, mapped
    )
    if settings is not None:
        settings.compute_dtype = compute.dtype
        if stored is not None:  # what makes transformers take the packed tensors as they are
            config.quantization_config = settings.own_dict()
    place = torch.device("cpu") if weight_tier == "host" else target
    model = _build(source, config, tensors, settings, compute.dtype, place, trust_remote_code)
    check_model(model, str(source))
    tokenizers.fit_embeddings(model, tokenizer)
    model.requires_grad_(False)
    report = _report(os.fspath(path), model, settings, compute.reason)
    model.fourbit_report = report  # type: ignore[assignment]  # modules take any attribute
    if "peft" in sys.modules:  # who has imported it may call it; it is slow to import for nothing
        from fourbit.model.adapters import register_layers

        register_layers()
    if mapped:
        stream_weights(model, _layers(model), mapped)
    elif weight_tier == "host":
        stream_from_host(model, _layers(model), target)
    return model, tokenizer


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    decoder, _ = split_model(model)
    owner, name = layer_list(decoder, model.config.get_text_config().num_hidden_layers)
    return list(getattr(owner, name))


def load_tokenizer(
    path: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` gives with this model, without its weights. Raises ModelError."""
    return _read_tokenizer(locate(os.fspath(path), revision), trust_remote_code)


def load_report(model: nn.Module) -> LoadReport:
    """What `load` did to get this model, or the base below this adapter."""
    return cast(LoadReport, model.fourbit_report)


def _read_tokenizer(source: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    tokenizer = (
        gguf.read_tokenizer(source)
        if source.is_file()
        else tokenizers.read_tokenizer(source, trust_remote_code)
    )
    tokenizers.ensure_pad_token(tokenizer)
    return tokenizer


def _open(
    source: Path,
    config: PretrainedConfig,
    is_gguf: bool,
    quant_type: str,
    double_quant: bool,
    block_size: int,
    trust_remote_code: bool,
    mapped: list[MappedFile] | None,
) -> tuple[dict[str, Any], FourBitConfig | None]:
    """The unread tensors, and how to hold them (None: as they are)."""
    stored = getattr(config, "quantization_config", None)
    if own.is_own(stored):
        del config.quantization_config
        skeleton = make_skeleton(source, config, trust_remote_code)
        return open_own(source, skeleton, stored, mapped)
    if stored is not None:
        packed = hf.open_folder(source, mapped)
        tensors, scheme = bnb.convert_names(packed, str(source))
        del config.quantization_config
        skeleton = make_skeleton(source, config, trust_remote_code)
        check_total(source, skeleton, packed)
        bnb.check_places(scheme, str(source), packed_shapes(skeleton))
        left = [name for name in linear_names(skeleton, []) if name not in scheme.quantized]
        left += experts_names(skeleton, [])  # which such checkpoints have in 16 bits
        settings = FourBitConfig(
            scheme.quant_type, scheme.block_size, scheme.double_quant, modules_to_not_convert=left
        )
        return tensors, settings
    skeleton = make_skeleton(source, config, trust_remote_code)
    tensors, _ = open_weights(source, skeleton)
    check_total(source, skeleton, tensors)
    check_fit(source, skeleton, {canonical_name(name, skeleton): t for name, t in tensors.items()})
    if quant_type == "none":
        return tensors, None
    settings = FourBitConfig(quant_type, block_size, double_quant)
    return _keep_precision(tensors, skeleton), settings


def _keep_precision(tensors: dict[str, LazyTensor], skeleton: PreTrainedModel) -> dict[str, Any]:
    names = quantized_weights(skeleton)
    return {
        key: OriginalTensor(tensor) if canonical_name(key, skeleton) in names else tensor
        for key, tensor in tensors.items()
    }


def _build(
    source: Path,
    config: PretrainedConfig,
    tensors: dict[str, Any],
    settings: FourBitConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
) -> PreTrainedModel:
    model_class = type(make_skeleton(source, config, trust_remote_code))
    arguments: dict[str, Any] = {
        "config": config,
        "state_dict": tensors,
        "dtype": dtype,
        "output_loading_info": True,
    }
    if settings is not None and getattr(config, "quantization_config", None) is None:
        arguments["quantization_config"] = settings
    if device.type != "cpu":
        arguments["device_map"] = {"": device}
    try:
        with _quiet_transformers():
            model, info = guard(source, lambda: model_class.from_pretrained(None, **arguments))
    except ModelError:
        if settings is not None and settings._failure is not None:
            raise ModelError(f"{source}: {settings._failure}") from None
        raise
    if info["missing_keys"]:
        raise ModelError(
            f"{source}: lacks {_few(sorted(info['missing_keys']))}; the checkpoint is incomplete"
        )
    if info["mismatched_keys"]:
        name, *shapes = next(iter(info["mismatched_keys"]))
        raise ModelError(f"{source}: '{name}' has shape {shapes[0]}, the config says {shapes[1]}")
    model.name_or_path = model.config.name_or_path = str(source)  # PEFT writes it into adapters
    if (source / "generation_config.json").exists():
        model.generation_config = guard(
            source / "generation_config.json", lambda: GenerationConfig.from_pretrained(str(source))
        )
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its report of missing keys is a table, ours is an error; its progress bar is for terminals."""
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if bar and not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()


def _report(path: str, model: PreTrainedModel, settings: FourBitConfig | None, reason: str) -> LoadReport:
    packed = list(packed_parts(model))
    packed_bytes = sum(part.nbytes for part in packed)
    weights = sum(part.weights for part in packed)
    packed_ids = {id(p) for part in packed for p in (part.codes, *part.scales)}
    rest = [p for p in model.parameters() if id(p) not in packed_ids]
    layers = sum(isinstance(part.module, Linear4bit) for part in packed)
    left = tuple(left_unpacked(model))
    return LoadReport(
        source=path,
        quant_type=settings.quant_type if settings else "none",
        converted=layers,
        experts=sum(part.count for part in packed) - layers,
        left=left,
        rest_dtype=rest[0].dtype,
        weight_bytes=packed_bytes + sum(p.nbytes for p in rest),
        bits_per_weight=8 * packed_bytes / max(1, weights),
        compute_reason=reason,
        parameters=weights + sum(p.numel() for p in rest),
    )


def _few(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
