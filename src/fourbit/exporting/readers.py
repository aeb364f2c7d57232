"""Independent readers: each reads an artifact with the software that serves it, not with fourbit's loader.

artifact                                    read by
folder, 16 or 32 bits                       transformers
folder, bitsandbytes 4-bit                  transformers with bitsandbytes
folder, compressed-tensors (GPTQ, AWQ)      transformers with compressed-tensors
adapter folder                              PEFT, on the base at 16 bits read by transformers
.gguf file                                  llama.cpp; a LoRA file on the base's .gguf
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

import fourbit
from fourbit.config import ModelSettings
from fourbit.data.render import Example
from fourbit.data.tokens import TextTokenizer
from fourbit.errors import FourBitError, ModelError
from fourbit.exporting.llama_cpp import PACKAGE, LlamaCpp, is_lora
from fourbit.exporting.scoring import RowProgress, RowScore, score_rows
from fourbit.limits import parse_json
from fourbit.memory.measure import release_free_memory
from fourbit.model.adapter_check import check_adapter
from fourbit.model.adapters import load_adapter
from fourbit.model.compute import choose_compute_dtype, choose_device
from fourbit.model.load import load

#: Formats of artifacts, and what a reader of each needs beside transformers.
PACKAGES = {
    "16-bit": (),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "adapter": ("peft",),
    "gguf": ("gguf", PACKAGE),
    "lora gguf": ("gguf", PACKAGE),
}


class Reader(Protocol):
    """A model read back.

    name           the software and its version
    chat_template  of the artifact's own tokenizer; None where it has none, or no tokenizer
    """

    name: str
    chat_template: str | None

    def tokenize(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Token ids of texts, markers such as <|im_start|> as the tokens they stand for, nothing added.

        None where the artifact carries no tokenizer.
        """

    def score(self, examples: Sequence[Example], progress: RowProgress | None = None) -> list[RowScore]:
        """Loss and likeliest tokens of rows."""

    def close(self) -> None:
        """Let go of the model."""


class TorchReader:
    """A transformers or PEFT model in this process, and the tokenizer that came with it."""

    def __init__(self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        template = tokenizer.chat_template if tokenizer is not None else None
        self.chat_template = template if isinstance(template, str) else None

    def tokenize(self, texts: Sequence[str]) -> list[list[int]] | None:
        if self.tokenizer is None:
            return None
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def score(self, examples: Sequence[Example], progress: RowProgress | None = None) -> list[RowScore]:
        return score_rows(self.model, examples, progress)

    def close(self) -> None:
        self.model = None


class FourbitReader(TorchReader):
    """The reference: the training base as fourbit holds it, with the adapter."""

    tokenizer: PreTrainedTokenizerBase

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [tokens.ids for tokens in TextTokenizer(self.tokenizer)(list(texts))]


def open_reference(settings: ModelSettings, adapter: str | os.PathLike[str] | None) -> FourbitReader:
    """The training base with the adapter on it."""
    model, tokenizer = load(settings.path, **settings.model_dump(exclude={"path"}))
    whole = load_adapter(model, adapter) if adapter is not None else model
    return FourbitReader(f"fourbit {fourbit.__version__}", whole.eval(), tokenizer)


def open_reader(
    artifact: Path, settings: ModelSettings, gguf_base: Path | None = None, context: int = 1024
) -> Reader:
    """The reader that fits an artifact.

    settings   the training base's: an adapter is read on it; dtype and device are the reference's too
    gguf_base  the .gguf file that a LoRA .gguf is put on; default the base itself where it is one
    context    tokens of the longest row, for readers that must know

    Raises ModelError for an artifact that cannot be read, or whose reader is not installed.
    """
    kind = format_of(artifact)
    require(kind, artifact)
    with _one_line(artifact):
        if kind == "gguf":
            return LlamaCpp(artifact, None, context)
        if kind == "lora gguf":
            return LlamaCpp(_gguf_base(artifact, settings, gguf_base), artifact, context)
        device = choose_device(settings.device)
        dtype = choose_compute_dtype(settings.compute_dtype, device).dtype
        if kind == "adapter":
            return _read_adapter(artifact, settings, dtype, device)
        model = _from_pretrained(artifact, dtype, device, settings.trust_remote_code)
        return TorchReader(_name(kind), model, _tokenizer(artifact, settings.trust_remote_code))


def release() -> None:
    """Give back the memory of a reader that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_free_memory()


def format_of(artifact: Path) -> str:
    """A key of PACKAGES; raises ModelError for what is no artifact, or in a format without a reader."""
    if artifact.is_file() and artifact.suffix == ".gguf":
        return "lora gguf" if is_lora(artifact) else "gguf"
    if (artifact / "adapter_config.json").exists():
        return "adapter"
    if not (artifact / "config.json").exists():
        raise ModelError(f"{artifact}: no model folder, adapter folder or .gguf file; give what was exported")
    try:
        config = parse_json((artifact / "config.json").read_bytes())
        method = (config.get("quantization_config") or {}).get("quant_method", "16-bit")
    except (OSError, ValueError, AttributeError):
        raise ModelError(f"{artifact / 'config.json'}: cannot be read; export again") from None
    if method not in PACKAGES:
        raise ModelError(
            f"{artifact}: quantized by '{method}', which no independent reader is known for; "
            "export it as hf, bnb, gguf, gptq or awq"
        )
    return str(method)


def require(kind: str, artifact: Path) -> None:
    """Raise ModelError, naming the command that installs it, where a reader's package is missing."""
    for package in PACKAGES[kind]:
        if find_spec(package.replace("-", "_")) is None:
            raise ModelError(
                f"{artifact}: reading it back needs the package {package}, which is not installed: "
                f"pip install {package}"
            )


def _gguf_base(artifact: Path, settings: ModelSettings, gguf_base: Path | None) -> Path:
    base = gguf_base or Path(settings.path)
    if base.suffix != ".gguf" or not base.is_file():
        raise ModelError(
            f"{artifact}: a LoRA file is read on its base as .gguf, and {base} is none; "
            "give it with --gguf-base"
        )
    return base


def _read_adapter(
    folder: Path, settings: ModelSettings, dtype: torch.dtype, device: torch.device
) -> TorchReader:
    from peft import PeftModel

    base = _from_pretrained(Path(settings.path), dtype, device, settings.trust_remote_code)
    check_adapter(folder, base)  # PEFT would load pickled weights
    with _quiet():
        model = PeftModel.from_pretrained(base, str(folder))
    tokenizer = _tokenizer(folder, False) if (folder / "tokenizer.json").exists() else None
    return TorchReader(_name("adapter"), model.eval(), tokenizer)


def _from_pretrained(source: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    from transformers import CompressedTensorsConfig, GgufConfig

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    place = str(source)
    if source.suffix == ".gguf":
        place = str(source.parent)
        options |= {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
    elif source.is_dir() and format_of(source) == "compressed-tensors":
        # Otherwise transformers 5.23 expects zero points unpacked, and refuses AWQ's.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if device.type != "cpu":
        options["device_map"] = {"": device}
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(place, **options)
    return model.eval()


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)


def _name(kind: str) -> str:
    """Software and versions, such as "transformers 5.23.0, bitsandbytes 0.50.2"."""
    return ", ".join(f"{package} {version(package)}" for package in ("transformers", *PACKAGES[kind]))


@contextmanager
def _one_line(artifact: Path) -> Iterator[None]:
    """What another library raises about an artifact, as one line."""
    try:
        yield
    except FourBitError:
        raise
    except Exception as error:  # readers raise every class there is
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise ModelError(f"{artifact}: cannot be read back ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no warnings of other libraries about how they load."""
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
