"""Every parser of fourbit as a function of bytes, and the inputs from which fuzzing starts.

A target gets an empty folder of its own and the bytes. It may return or raise FourBitError; whatever else it
raises is a defect, and so is an answer that takes longer than a second or two.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from fourbit.config import DataSettings
from fourbit.config_file import load_config
from fourbit.data.encode import encode
from fourbit.data.read import read_rows
from fourbit.data.template import ChatTemplate
from fourbit.errors import FourBitError
from fourbit.exporting import provenance
from fourbit.exporting.adapter import read_adapter as read_for_merging
from fourbit.model.adapter_check import check_adapter
from fourbit.model.adapter_folder import read_config as read_adapter_config
from fourbit.model.adapter_folder import summarize
from fourbit.model.base import make_skeleton, open_base, read_config
from fourbit.model.formats import bnb, gguf, hf, own, pretokenizers
from fourbit.model.formats.lazy import LazyTensor
from fourbit.model.packed_folder import packed_as
from fourbit.model.quantizer import FourBitConfig
from fourbit.model.tokenizer import ensure_pad_token, read_tokenizer
from fourbit.report.curves import read_curves
from fourbit.training import checkpoint
from tests.exporting.gguf.models import byte_level
from tests.tiny import CHATML, byte_tokenizer

CORPUS = Path(__file__).parent / "corpus"
Read = Callable[[bytes, Path], None]


@dataclass(frozen=True)
class Target:
    """read: the parser; slow: takes tens of milliseconds for an input."""

    read: Read
    slow: bool = False


def run_one(target: Target, data: bytes, folder: Path) -> bool:
    """Whether the parser took the input; raises what it must not raise."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        target.read(data, folder)
    except FourBitError as error:
        text = str(error)
        if not text or len(text) > 1003 or not text.isprintable():
            raise AssertionError(f"not one clear line: {text!r}") from error
        return False
    return True


def corpus(name: str) -> list[bytes]:
    """The inputs of a target that the repository holds."""
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


@cache
def tiny_config() -> LlamaConfig:
    """A model of a few kilobytes whose rows are whole blocks of 32."""
    return LlamaConfig(
        vocab_size=len(merging_tokenizer()),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )


def tiny_mixture() -> MixtralForCausalLM:
    """A mixture on the meta device, new each time."""
    sizes = {key: getattr(tiny_config(), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = MixtralConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2
    )
    with torch.device("meta"):
        return MixtralForCausalLM(config)


@cache
def mixture_parts() -> dict[str, LazyTensor]:
    """The packed tensors of that mixture in NF4, blocks of 64, double quantization."""
    shapes = packed_as(tiny_mixture(), FourBitConfig(modules_to_not_convert=["lm_head"]))
    return {
        name: LazyTensor(lambda shape=shape: torch.zeros(shape, dtype=torch.uint8), torch.uint8, shape)
        for name, shape in shapes.items()
    }


@cache
def tiny_model() -> LlamaForCausalLM:
    """The model on the meta device."""
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_config())


@cache
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, which GGUF files hold only with merges."""
    return byte_level()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with ChatML's template."""
    return byte_tokenizer()


def _rows(suffix: str) -> Read:
    """A data file up to the tokens of its examples."""

    def read(data: bytes, folder: Path) -> None:
        file = folder / f"data{suffix}"
        file.write_bytes(data)
        settings = DataSettings(
            train=str(file), allow=("empty", "no_trained_token", "no_end_token", "refused")
        )
        encode(read_rows([file], settings), tokenizer(), settings)

    return read


def _arrow(data: bytes, folder: Path) -> None:
    for file in (CORPUS.parent / "folders" / "arrow").iterdir():
        shutil.copy(file, folder / file.name)
    # The first byte says which of the files is replaced.
    name = ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")[(data or b"\0")[0] % 3]
    (folder / name).write_bytes(data[1:])
    read_rows([folder], DataSettings(train=str(folder)))


def _safetensors(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    for tensor in hf.open_folder(folder).values():
        tensor.read()


def _index(data: bytes, folder: Path) -> None:
    for number, name in enumerate("ab", start=1):
        save_file({name: torch.zeros(2)}, str(folder / f"model-{number}.safetensors"))
    (folder / "model.safetensors.index.json").write_bytes(data)
    hf.open_folder(folder)


def _gguf(data: bytes, folder: Path) -> None:
    file = folder / "model.gguf"
    file.write_bytes(data)
    gguf.read_metadata(file, "general.license")
    for tensor in gguf.open_file(file, tiny_model()).values():
        tensor.read()


def _gguf_model(data: bytes, folder: Path) -> None:
    file = folder / "model.gguf"
    file.write_bytes(data)
    gguf.read_tokenizer(file)
    open_base(file)


def _bnb(data: bytes, folder: Path) -> None:
    """Byte 0: how many codes are missing, and 4 for fp32 scales; the rest: the quant_state."""
    wrong, plain = (data or b"\0")[0] & 3, (data or b"\0")[0] & 4
    text = torch.frombuffer(bytearray(data[1:] or b" "), dtype=torch.uint8)

    def part(tensor: torch.Tensor) -> LazyTensor:
        return LazyTensor(lambda: tensor, tensor.dtype, tuple(tensor.shape))

    name = "model.layers.0.self_attn.q_proj.weight"
    parts = {
        name: torch.zeros(512 - wrong, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(16, dtype=torch.float32 if plain else torch.uint8),
        f"{name}.nested_absmax": torch.ones(1),
        f"{name}.quant_state.bitsandbytes__nf4": text,
    }
    tensors, scheme = bnb.convert_names({key: part(value) for key, value in parts.items()}, str(folder))
    for tensor in bnb.restored(tensors, scheme, {name: (32, 32)}, str(folder)).values():
        tensor.read()


def _own(data: bytes, folder: Path) -> None:
    """The quantization_config of a checkpoint under quant_method "fourbit": the parts of a tiny mixture."""
    settings = None
    with suppress(ValueError, RecursionError):
        settings = json.loads(data)
    if own.is_own(settings):
        found = own.read_scheme(settings, str(folder))
        kind = found.quant_type, found.block_size, found.double_quant, None, list(found.left)
        own.checked(mixture_parts(), packed_as(tiny_mixture(), FourBitConfig(*kind)), str(folder))


def _model_config(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    make_skeleton(folder, read_config(folder, False, False), False)


def _tokenizer(data: bytes, folder: Path) -> None:
    byte_tokenizer().save_pretrained(str(folder))
    (folder / "tokenizer.json").write_bytes(data)
    found = read_tokenizer(folder, False)
    ensure_pad_token(found)
    description: dict[str, Any] = json.loads(found.backend_tokenizer.to_str())
    pretokenizers.by_description(description["pre_tokenizer"], False)


def _template(data: bytes, folder: Path) -> None:
    found = byte_tokenizer()
    found.chat_template = data.decode("utf-8", "replace") or CHATML
    turns = [{"role": role, "content": role * 2} for role in ("user", "assistant", "user", "assistant")]
    ChatTemplate(found).answers(turns, str(folder))


def _adapter(name: str) -> Read:
    """An adapter of which one file is replaced, through all that reads adapters."""

    def read(data: bytes, folder: Path) -> None:
        for file in (CORPUS.parent / "folders" / "adapter").iterdir():
            shutil.copy(file, folder / file.name)
        (folder / name).write_bytes(data)
        failures = 0
        for action in (
            lambda: summarize(folder),
            lambda: check_adapter(folder, tiny_model()),
            lambda: _merge(folder),
        ):
            try:
                action()
            except FourBitError:
                failures += 1
        if failures == 3:
            summarize(folder)  # for its message

    return read


def _merge(folder: Path) -> None:
    found = read_for_merging(folder, tiny_model(), read_adapter_config(folder))
    for name, delta in found.deltas.items():
        delta.apply(torch.zeros(tiny_model().get_parameter(name).shape))


def _settings(data: bytes, folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_bytes(data)
    load_config(file)


def _overrides(data: bytes, folder: Path) -> None:
    load_config(None, data.decode("utf-8", "replace").splitlines())


def _checkpoint(data: bytes, folder: Path) -> None:
    place = folder / "checkpoints" / "step-000001"
    place.mkdir(parents=True)
    with suppress(ValueError, RecursionError):  # a right checksum, so that more than it is tried
        content = json.loads(data)
        if isinstance(content, dict):
            content.pop("sha256", None)
            data = json.dumps({"sha256": checkpoint._digest(content), **content}).encode()
    (place / "state.json").write_bytes(data)
    checkpoint.recorded_compute_dtype(folder)
    checkpoint.newest(folder, lambda note: None)


def _provenance(data: bytes, folder: Path) -> None:
    (folder / "provenance.json").write_bytes(data)
    provenance.read(folder)


def _metrics(data: bytes, folder: Path) -> None:
    for name in ("metrics.jsonl", "timing.jsonl"):
        (folder / name).write_bytes(data)
    read_curves(folder)


TARGETS: dict[str, Target] = {
    "safetensors": Target(_safetensors),
    "index": Target(_index),
    "gguf": Target(_gguf, slow=True),
    "gguf_model": Target(_gguf_model, slow=True),
    "bnb": Target(_bnb),
    "own": Target(_own, slow=True),
    "model_config": Target(_model_config, slow=True),
    "tokenizer": Target(_tokenizer, slow=True),
    "template": Target(_template),
    "adapter_config": Target(_adapter("adapter_config.json")),
    "adapter_weights": Target(_adapter("adapter_model.safetensors")),
    "settings": Target(_settings),
    "overrides": Target(_overrides),
    "jsonl": Target(_rows(".jsonl")),
    "json": Target(_rows(".json")),
    "csv": Target(_rows(".csv")),
    "text": Target(_rows(".md")),
    "gz": Target(_rows(".jsonl.gz")),
    "zst": Target(_rows(".jsonl.zst")),
    "zip": Target(_rows(".zip")),
    "parquet": Target(_rows(".parquet")),
    "arrow": Target(_arrow, slow=True),
    "checkpoint": Target(_checkpoint),
    "provenance": Target(_provenance),
    "metrics": Target(_metrics),
}
