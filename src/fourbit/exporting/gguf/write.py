"""A model as one GGUF file, tensor by tensor: memory holds one tensor and a slice of its bytes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fourbit.errors import ModelError
from fourbit.exporting.gguf import architecture, kquants, types
from fourbit.exporting.gguf.vocabulary import add_vocabulary
from fourbit.model.formats.lazy import LazyTensor

#: Called with tensors written so far and tensors there are.
WriteProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the file: where its values come from and how they are stored."""

    name: str  # in the file
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    read: Callable[[], Tensor]
    source: str  # Hugging Face's name, for messages


def write_gguf(
    tensors: Mapping[str, LazyTensor],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    quant: str = "F16",
    progress: WriteProgress | None = None,
) -> Path:
    """Write a causal language model for llama.cpp.

    tensors  16- or 32-bit weights by Hugging Face name, each read once
    quant    F32, F16, BF16, Q8_0, Q4_0; or a K-quant (Q4_K_M, ...), which llama.cpp makes from a 16-bit
             file that is written beside it first and removed

    The file appears under its name only when it is complete. Raises ModelError for what llama.cpp cannot
    compute or tokenize the same way, ConfigError for an unknown type.
    """
    types.check_quant(quant)
    target = Path(path)
    if quant not in types.K_QUANTS:
        with written_aside(target) as partial:
            _write(tensors, config, tokenizer, partial, target.stem, quant, progress)
        return target
    kquants.require()
    whole = "BF16" if all(t.dtype == torch.bfloat16 for t in tensors.values()) else "F16"
    with written_aside(target.with_name(f"{target.stem}.{whole}.gguf"), keep=False) as full:
        _write(tensors, config, tokenizer, full, target.stem, whole, progress)
        with written_aside(target) as partial:
            kquants.quantize(full, partial, quant)
    return target


@contextmanager
def written_aside(target: Path, keep: bool = True) -> Iterator[Path]:
    """A path to write to, which takes the target's name at the end, and is removed on an error.

    keep: False for a file that is only needed within the block.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    try:
        yield partial
        if keep:
            os.replace(partial, target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _write(
    tensors: Mapping[str, LazyTensor],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    name: str,
    quant: str,
    progress: WriteProgress | None,
) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFWriter

    arch = architecture.architecture(config)
    entries = _entries(tensors, config, arch, quant)
    writer = GGUFWriter(path, arch.name)
    try:
        writer.add_type("model")
        writer.add_name(name)
        architecture.add_model(writer, config, arch)
        add_vocabulary(writer, tokenizer, config.vocab_size)
        writer.add_file_type(types.file_type(quant))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for entry in entries:
            size = types.stored_bytes(entry.shape, entry.kind)
            # raw_dtype decides; of the dtype only that it is not uint8 matters, which would mean bytes.
            writer.add_tensor_info(entry.name, entry.shape, np.dtype("f2"), size, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        stream = writer.fout[0]
        for done, entry in enumerate(entries, start=1):
            # Written here, not by the writer, which would want all of a tensor's bytes at once.
            writer.write_padding(stream, stream.tell())
            for part in types.encode(_read(entry), entry.kind, entry.source):
                stream.write(part.data)
            if progress is not None:
                progress(done, len(entries))
        writer.write_padding(stream, stream.tell())
    finally:
        writer.close()


def _read(entry: _Entry) -> Tensor:
    values = entry.read()
    if tuple(values.shape) != entry.shape:
        raise ModelError(
            f"tensor '{entry.source}' has shape {list(values.shape)}, the config says {list(entry.shape)}"
        )
    return values


def _entries(
    tensors: Mapping[str, LazyTensor],
    config: PretrainedConfig,
    arch: architecture.Architecture,
    quant: str,
) -> list[_Entry]:
    shapes = parameter_shapes(config)
    tied = bool(config.tie_word_embeddings)
    # What older checkpoints hold beside the weights: a head that is the embedding, rotary constants.
    given = {
        name
        for name in tensors
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    }
    if given != set(shapes):
        missing, unknown = sorted(set(shapes) - given), sorted(given - set(shapes))
        what = f"lacks '{missing[0]}'" if missing else f"holds '{unknown[0]}', which has no place in it"
        raise ModelError(f"the checkpoint of this '{config.model_type}' model {what}; nothing was exported")
    output = "model.embed_tokens.weight" if tied else "lm_head.weight"
    names = file_names(arch, config)
    entries = []
    for name, shape in shapes.items():
        change = architecture.transform(name, config, arch)
        kind = types.tensor_type(name, shape, quant, name == output)
        entries.append(_Entry(names(name), shape, kind, _changed(tensors[name], change), name))
    factors = architecture.rotary_factors(config)
    if factors is not None:
        kind = types.tensor_type("rope_freqs", factors.shape, quant, False)
        entries.append(_Entry("rope_freqs.weight", tuple(factors.shape), kind, lambda: factors, "rope_freqs"))
    return entries


def file_names(arch: architecture.Architecture, config: PretrainedConfig) -> Callable[[str], str]:
    """The function from Hugging Face's tensor names to the file's; it raises ModelError for others."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    key = next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch.name)
    table = get_tensor_name_map(key, config.num_hidden_layers)

    def name_of(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"tensor '{name}' has no name in llama.cpp's '{arch.name}' models")
        return str(found)

    return name_of


def _changed(tensor: LazyTensor, change: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: change(tensor.read())


def parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model by Hugging Face name; what is tied stands under one name."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config  # the tensors given are not quantized
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(plain)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
