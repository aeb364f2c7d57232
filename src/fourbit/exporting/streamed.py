"""A whole 16-bit model as tensors on demand: what every writer of an export takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fourbit.errors import ConfigError, ModelError
from fourbit.exporting import provenance
from fourbit.model import tokenizer as tokenizers
from fourbit.model.base import Base, open_base
from fourbit.model.formats import gguf
from fourbit.model.formats.lazy import LazyStack, LazyTensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Streamed:
    """A model ready to be written.

    tensors  every stored weight by its Hugging Face name; tied ones once
    config   of the model as it will be written, without quantization_config
    dtype    of the weights; None: unrounded, those that an adapter changed in fp32, others as stored
    base     what it is made from: its folder or file, its tokenizer
    chain    the steps that made it, newest last
    """

    tensors: dict[str, LazyTensor]
    config: PretrainedConfig
    dtype: torch.dtype | None
    base: Base
    chain: tuple[provenance.Step, ...]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's, as it came."""
        return base_tokenizer(self.base)


def stream_model(
    path: str | os.PathLike[str],
    dtype: str | None = "bfloat16",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Streamed:
    """A model as it lies on disk; 4-bit and GGUF weights are restored. Raises ModelError or ConfigError."""
    target = None if dtype is None else choose_dtype(dtype)
    base = open_base(path, revision, trust_remote_code)
    tensors = {
        name: rounded(name, tensor, target) for name, tensor in base.tensors.items() if name not in base.tied
    }
    chain = tuple(provenance.read(base.path))
    return Streamed(tensors, written_config(base, target), target, base, chain)


def base_tokenizer(base: Base, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a .gguf file."""
    if base.is_gguf:
        return gguf.read_tokenizer(base.path)
    return tokenizers.read_tokenizer(base.path, trust_remote_code)


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of a name; raises ConfigError for another than the three."""
    if name not in DTYPES:
        raise ConfigError(f"dtype '{name}': must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def rounded(name: str, tensor: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    """The tensor in another floating dtype, or in its own.

    Reading it raises ModelError for NaN and for values that have no place in the dtype.
    """
    if not tensor.is_floating_point():
        return tensor
    target = dtype or tensor.dtype

    def fitting(values: Tensor) -> Tensor:
        result = values.to(target)
        if result.numel() and not torch.stack(torch.aminmax(result)).isfinite().all():
            raise ModelError(
                f"'{name}' has values that are not finite in {str(target).removeprefix('torch.')}; "
                "if the model is sound, choose bfloat16"
            )
        return result

    if isinstance(tensor, LazyStack):
        return tensor.changed(lambda _, matrix: fitting(matrix), target)
    return LazyTensor(lambda: fitting(tensor.read()), target, tensor.shape)


def file_tensors(model: Streamed) -> dict[str, LazyTensor]:
    """The model's tensors as its base stores them: experts' matrices apart, and under the names there."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in model.tensors.items():
        if isinstance(tensor, LazyStack) and tensor.sources:
            result |= tensor.apart()
        else:
            result[model.base.renamed.get(name, name)] = tensor
    return result


def written_config(base: Base, dtype: torch.dtype | None) -> PretrainedConfig:
    """The base's configuration for the model that will be written."""
    config = type(base.config).from_dict(base.config.to_dict())
    config.dtype = dtype or torch.float32
    config.architectures = [type(base.skeleton).__name__]
    return config
