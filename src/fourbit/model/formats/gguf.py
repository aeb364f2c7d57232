"""GGUF files: weights, config, tokenizer and chat template out of one file, tensor by tensor.

transformers reads GGUF too, but builds the whole dense model first; here each tensor is dequantized
when the loader asks for it. Names come from gguf's own map, and what llama.cpp changed on the way in
(rotary permutation of q and k, +1 on Gemma's norms, GPT-2's transposes) is undone by transformers'
tensor processors.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fourbit.errors import ModelError
from fourbit.model.formats import pretokenizers
from fourbit.model.formats.gguf_check import check_gguf
from fourbit.model.formats.lazy import LazyTensor
from fourbit.model.sizes import check_layer_count


def read_config(file: Path) -> PretrainedConfig:
    """The model's configuration from the file's metadata. Raises ModelError."""
    numbers, tensors = check_gguf(file)
    for key, number in numbers.items():
        if key.endswith(".block_count"):
            check_layer_count(file, key, number)
            if number > tensors:
                raise ModelError(
                    f"{file}: {key} is {number} and the file holds {tensors} tensors; is it complete?"
                )
    with _given_to_transformers(_parsed(file)):
        return _guard(file, lambda: AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name))


def read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer and its chat template from the file's metadata.

    transformers knows only some of the ways to split text that a file can name, and splits as GPT-2 does
    otherwise, and its versions differ in what else they take from the file; here the file's own split and
    its first and last token are set. Raises ModelError for a way to split that is not known.
    """
    reader = _open(file)
    with _given_to_transformers(reader):
        tokenizer: Any = _guard(
            file, lambda: AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        )
    if _text(file, reader, "tokenizer.ggml.model") != "gpt2":
        return tokenizer
    name = _text(file, reader, "tokenizer.ggml.pre")
    split = pretokenizers.by_name(name)
    if split is None:
        raise ModelError(
            f"{file}: its tokenizer splits text as '{name}', which is not known here; "
            "give the original model folder"
        )
    pretokenizers.apply(split, tokenizer.backend_tokenizer)
    for name in ("bos", "eos"):
        field = reader.get_field(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            token = tokenizer.convert_ids_to_tokens(int(field.contents()))
            setattr(tokenizer, f"{name}_token", token)
    return tokenizer


def read_metadata(file: Path, key: str) -> str | None:
    """One text of the file's metadata, such as general.license, or None."""
    return _text(file, _open(file), key) or None


def open_file(file: Path, skeleton: PreTrainedModel) -> dict[str, LazyTensor]:
    """Every tensor by its Hugging Face name, undequantized.

    skeleton: the model on the meta device; its parameter names decide the mapping.
    Raises ModelError for a damaged file, an unknown architecture, or a tensor without a place.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    reader = _open(file)
    architecture = _text(file, reader, "general.architecture") or "unknown"
    processor_class: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = processor_class(config=skeleton.config.to_dict())
    with _one_name_map():
        names = _guard(file, lambda: get_gguf_hf_weights_map(skeleton, processor))

    tensors: dict[str, LazyTensor] = {}
    for entry in reader.tensors:
        if entry.name == "rope_freqs.weight":  # llama.cpp's copy of what the config already says
            continue
        if entry.name not in names:
            raise ModelError(f"{file}: tensor '{entry.name}' has no place in a {architecture} model")
        name = names[entry.name]
        shape = tuple(skeleton.get_parameter(name).shape)
        if prod(shape) != entry.n_elements:
            raise ModelError(
                f"{file}: tensor '{entry.name}' has {entry.n_elements:,} values, "
                f"the config says {list(shape)}"
            )
        tensors[name] = LazyTensor(_reader(file, entry, processor), torch.float32, shape)
    return tensors


@contextmanager
def _one_name_map() -> Iterator[None]:
    """transformers asks for the names of all layers anew at each of their modules; here once is enough.

    A file that claims two thousand layers would take hours.
    """
    import gguf

    original = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(original)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = original


@contextmanager
def read_once() -> Iterator[None]:
    """Within this block a file's header is parsed once, which takes a second and 70 MB."""
    token = _open_readers.set({})
    try:
        yield
    finally:
        _open_readers.reset(token)


_open_readers: ContextVar[dict[Path, Any] | None] = ContextVar("open_readers", default=None)


def _open(file: Path) -> Any:
    if file not in (_open_readers.get() or {}):
        check_gguf(file)
    return _parsed(file)


def _parsed(file: Path) -> Any:
    """A reader of a file that has been checked."""
    known = _open_readers.get()
    if known is not None and file in known:
        return known[file]
    reader = _guard(file, lambda: _reader_class()(str(file)))
    if known is not None:
        known[file] = reader
    return reader


@contextmanager
def _given_to_transformers(reader: Any) -> Iterator[None]:
    """Let transformers have this reader in place of one that it would make, more slowly, of the same file."""
    import gguf

    module: Any = gguf
    with _PATCHING:
        original = module.GGUFReader
        module.GGUFReader = lambda *_, **__: reader
        try:
            yield
        finally:
            module.GGUFReader = original


_PATCHING = threading.Lock()


@cache
def _reader_class() -> Any:
    """gguf's reader on a plain array over the mapped file: numpy's memmap takes thrice as long to slice."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    return Reader


def _text(file: Path, reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return _guard(file, lambda: str(field.contents())) if field is not None else ""


def _reader(file: Path, entry: Any, processor: Any) -> Callable[[], Tensor]:
    def read() -> Tensor:
        values = _guard(file, lambda: _values(entry), entry.name)
        result = processor.process(weights=values, name=entry.name)
        tensor = torch.from_numpy(np.require(result.weights, np.float32, ["C", "W"]))
        _forget(entry.data)
        return tensor

    return read


#: Values restored at once: a few megabytes beside the tensor, and numpy's own time is small against theirs.
_AT_ONCE = 1 << 20


def _values(entry: Any) -> Any:
    """A tensor's values in float32, in an array of their own.

    gguf restores a whole tensor in pieces too, but holds all of them before it joins them: the tensor twice.
    """
    from gguf import dequantize

    stored = entry.data.reshape(-1, entry.data.shape[-1])
    values = np.empty((len(stored), entry.n_elements // len(stored)), np.float32)
    step = max(1, _AT_ONCE // values.shape[1])
    for start in range(0, len(stored), step):
        values[start : start + step] = dequantize(stored[start : start + step], entry.tensor_type)
    return values.reshape([int(side) for side in entry.shape[::-1]])


def _forget(data: Any) -> None:
    """Let go of the file's pages that a read has touched; they would add up to the whole file."""
    mapping: Any = data
    while mapping is not None and not isinstance(mapping, mmap.mmap):
        mapping = getattr(mapping, "base", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _guard(file: Path, action: Callable[[], Any], tensor: str | None = None) -> Any:
    try:
        return action()
    except ModelError:
        raise
    except Exception as error:  # gguf and its reader raise every class there is on a damaged file
        where = f"{file}: tensor '{tensor}'" if tensor else str(file)
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(f"{where}: cannot be read as GGUF ({reason}); is the file complete?") from error
