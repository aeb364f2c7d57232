"""Merging a LoRA adapter into its base, tensor by tensor.

There are two weights to merge into. The original ones are exact, but the adapter was trained on 4-bit
weights and has learned to work with their errors. The dequantized ones are what it was trained on.
Which serves better differs by model, so either can be asked for, and the report says which it was.
A weight is computed in fp32 and rounded once; no more than a few tensors are in memory.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fourbit.errors import ConfigError, ModelError
from fourbit.exporting import provenance
from fourbit.exporting.adapter import Adapter, LoraDelta, StackDelta, read_adapter
from fourbit.exporting.streamed import (
    Progress,
    Streamed,
    base_tokenizer,
    choose_dtype,
    rounded,
    written_config,
)
from fourbit.functional import dequantize_4bit, quantize_4bit
from fourbit.model.adapter_folder import read_config
from fourbit.model.base import Base, open_base, quantized_weights, transposed_weights
from fourbit.model.formats.lazy import LazyStack, LazyTensor

Target = Literal["original", "dequantized"]


@dataclass(frozen=True)
class Quantization:
    """How a run held its base; the fields are those of `fourbit.config.ModelSettings`."""

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True


@dataclass(frozen=True)
class MergeReport:
    """What was merged into what.

    into           "original" or "dequantized"
    quantization   what was restored, where it is dequantized
    merged         weights that the adapter changed
    replaced       parameters that it replaced whole
    untied         the head became a matrix of its own, because the adapter changes one of the tied two
    base_verified  the base is the one that the adapter's record names; None without a record
    any_base       another base was allowed
    """

    base: str
    adapter: str
    into: Target
    quantization: Quantization | None
    method: str
    merged: int
    replaced: tuple[str, ...]
    untied: bool
    dtype: str | None
    base_verified: bool | None
    any_base: bool

    def lines(self) -> list[str]:
        """For people."""
        where = f"the original weights of {self.base}"
        if self.quantization is not None:
            where = f"the dequantized {self.quantization.quant_type} weights of {self.base}"
        dtype = self.dtype or "float32"
        text = f"{self.method} of {self.adapter} into {where}: {self.merged} weights in {dtype}"
        lines = [text + (f", {len(self.replaced)} replaced" if self.replaced else "")]
        if self.untied:
            lines.append("embedding and head were one matrix and are two now, since the adapter changes one")
        if self.base_verified is None:
            lines.append("the adapter carries no record of its base: names and shapes fit, more is not known")
        elif not self.base_verified:
            lines.append("this is not the base that the adapter's record names (accepted by --any-base)")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


@dataclass(frozen=True)
class Merged(Streamed):
    """A merged model ready to be written, and what was merged."""

    report: MergeReport


def merged_tensors(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    into: Target | None = None,
    original: str | os.PathLike[str] | None = None,
    quantization: Quantization | None = None,
    dtype: str | None = "bfloat16",
    any_base: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """A base with an adapter merged into it, to be read tensor by tensor.

    base          what the adapter was trained on: a folder, hub name, 4-bit checkpoint or .gguf file
    into          "original", "dequantized", or None: the original weights when they are at hand
    original      where they are, if not in `base`
    quantization  how the run held its base; None: as the adapter's record says, else the defaults
    dtype         "bfloat16", "float16" or "float32"; None: unrounded, for a writer that quantizes
    any_base      accept a base whose content is not the recorded one, such as another format of it

    Raises ModelError when adapter and base do not fit, for the wrong base, and for a base that holds this
    adapter already; ConfigError for settings that contradict one another.
    """
    folder, target_dtype = Path(adapter), None if dtype is None else choose_dtype(dtype)
    config = read_config(folder)
    record = provenance.read(folder)
    opened = open_base(base if original is None else original, revision, trust_remote_code)
    into = _choose_target(into, opened, original is not None)
    used = None
    if into == "dequantized":
        used = _quantization(opened, quantization or _recorded_quantization(record))
    sources = _sources(opened.path, folder, progress)
    _check_not_merged(opened.path, folder, sources[1].sha256)
    verified = _check_base(opened.path, folder, sources[0].sha256, record, any_base)

    found = read_adapter(folder, opened.skeleton, config)
    weights = opened.tensors if used is None or opened.scheme else _restored(opened, used)
    tensors, untied, rows = _merge(opened, weights, found, len(base_tokenizer(opened, trust_remote_code)))
    written = written_config(opened, target_dtype)
    if rows > opened.config.get_text_config().vocab_size:
        written.get_text_config().vocab_size = rows
    if untied:
        written.tie_word_embeddings = False
    report = MergeReport(
        base=str(opened.path),
        adapter=str(folder),
        into=into,
        quantization=used,
        method=found.method,
        merged=len(found.deltas),
        replaced=tuple(sorted(found.replaced)),
        untied=untied,
        dtype=dtype,
        base_verified=verified,
        any_base=any_base,
    )
    step = provenance.make_step("merge", sources, report.to_dict())
    return Merged(
        tensors={name: rounded(name, tensor, target_dtype) for name, tensor in tensors.items()},
        config=written,
        dtype=target_dtype,
        base=opened,
        chain=(*(record or provenance.read(opened.path)), step),
        report=report,
    )


def _choose_target(into: Target | None, opened: Base, given: bool) -> Target:
    if into is None:
        return "original" if opened.scheme is None else "dequantized"
    if into == "original" and opened.scheme is not None:
        which = "--original" if given else "the base"
        raise ConfigError(
            f"{opened.path}: {which} holds 4-bit weights; name the original model with --original, "
            "or merge into dequantized"
        )
    return into


def _quantization(opened: Base, wanted: Quantization) -> Quantization:
    if opened.scheme is not None:
        scheme = opened.scheme
        return Quantization(scheme.quant_type, scheme.block_size, scheme.double_quant)
    if wanted.quant_type == "none":
        raise ConfigError("the adapter was trained on unquantized weights; merge it into original")
    return wanted


def _recorded_quantization(record: list[provenance.Step]) -> Quantization:
    for step in reversed(record):
        model = step.settings.get("model") if step.kind == "train" else None
        if isinstance(model, dict):
            known = {key: model[key] for key in ("quant_type", "block_size", "double_quant") if key in model}
            return Quantization(**known)
    return Quantization()


def _sources(base: Path, adapter: Path, progress: Progress | None) -> tuple[provenance.Source, ...]:
    def hashed(done: int, total: int) -> None:
        if progress is not None:
            progress("identify the base (MB)", done // 1_000_000, total // 1_000_000)

    return provenance.describe("base", base, hashed), provenance.describe("adapter", adapter)


def _check_not_merged(base: Path, adapter: Path, sha256: str) -> None:
    for step in provenance.read(base):
        if step.kind == "merge" and any(s.role == "adapter" and s.sha256 == sha256 for s in step.sources):
            raise ModelError(f"{base}: {adapter} is merged into it already; give the model without it")


def _check_base(
    base: Path, adapter: Path, sha256: str, record: list[provenance.Step], any_base: bool
) -> bool | None:
    known = {
        source.sha256: source.path for step in record for source in step.sources if source.role == "base"
    }
    if not known:
        return None
    if sha256 not in known and not any_base:
        raise ModelError(
            f"{base}: not the base that {adapter} was trained on ({list(known.values())[-1]}, by content); "
            "if it is another format of the same model, say --any-base"
        )
    return sha256 in known


def _restored(opened: Base, quantization: Quantization) -> dict[str, LazyTensor]:
    """The base as the run held it: weights that it quantized, quantized and restored."""
    names, stored_so = quantized_weights(opened.skeleton), transposed_weights(opened.skeleton)

    def rounded_matrix(name: str, values: Tensor) -> Tensor:
        kind = quantization.quant_type, quantization.block_size, quantization.double_quant
        return dequantize_4bit(quantize_4bit(values, *kind, name=name), torch.float32)

    def restored(name: str, tensor: LazyTensor) -> LazyTensor:
        if isinstance(tensor, LazyStack):
            return tensor.changed(lambda _, matrix: rounded_matrix(name, matrix), torch.float32)

        def read() -> Tensor:
            if name not in stored_so:
                return rounded_matrix(name, tensor.read())
            return rounded_matrix(name, tensor.read().t().contiguous()).t().contiguous()

        return LazyTensor(read, torch.float32, tensor.shape)

    return {
        name: restored(name, tensor) if name in names else tensor for name, tensor in opened.tensors.items()
    }


def _merge(
    opened: Base, weights: dict[str, LazyTensor], adapter: Adapter, vocabulary: int
) -> tuple[dict[str, LazyTensor], bool, int]:
    """(tensors, whether tied weights came apart, rows of the embedding)."""
    tensors = {name: tensor for name, tensor in weights.items() if name not in opened.tied}
    untied = False
    for name, stored in opened.tied.items():
        changed = any(n in adapter.deltas or n in adapter.replaced for n in (name, stored))
        if changed and not _same_replacement(adapter, name, stored):
            tensors[name], untied = tensors[stored], True
    tensors |= {name: whole for name, whole in adapter.replaced.items() if name in tensors}
    rows = vocabulary
    ends = [name for name in _ends(opened) if name in tensors]
    for name in ends:
        rows = max(rows, *(shape[0] for shape in [tensors[name].shape] if shape))
    for name in ends:
        tensors[name] = _grown(tensors[name], rows)
    tensors |= {name: _changed(tensors[name], delta) for name, delta in adapter.deltas.items()}
    return tensors, untied, rows


def _same_replacement(adapter: Adapter, name: str, stored: str) -> bool:
    """PEFT trains tied weights as one where asked to, and saves that one under both names."""
    both = [adapter.replaced.get(n) for n in (name, stored)]
    if both[0] is None or both[1] is None or not adapter.config.get("ensure_weight_tying"):
        return False
    return torch.equal(both[0].read(), both[1].read())


def _ends(opened: Base) -> list[str]:
    """Names of the weights that have a row for every token."""
    modules = (opened.skeleton.get_input_embeddings(), opened.skeleton.get_output_embeddings())
    return [
        f"{name}.weight"
        for name, module in opened.skeleton.named_modules()
        if any(module is end for end in modules)
    ]


def _grown(tensor: LazyTensor, rows: int) -> LazyTensor:
    """With rows for tokens that the base has none for, as loading adds them: the mean of the others."""
    assert tensor.shape is not None
    missing = rows - tensor.shape[0]
    if missing <= 0:
        return tensor

    def read() -> Tensor:
        values = tensor.read()
        mean = values.float().mean(dim=0, keepdim=True).to(values.dtype)
        return torch.cat([values, mean.expand(missing, -1)])

    return LazyTensor(read, tensor.dtype, (rows, *tensor.shape[1:]))


def _changed(tensor: LazyTensor, delta: LoraDelta | StackDelta) -> LazyTensor:
    if isinstance(delta, StackDelta):
        assert isinstance(tensor, LazyStack)
        return tensor.changed(delta.apply, torch.float32)
    return LazyTensor(lambda: delta.apply(tensor.read()), torch.float32, tensor.shape)
