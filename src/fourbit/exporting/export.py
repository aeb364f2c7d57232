"""`fourbit.merge` and `fourbit.export`: a run, or a model and an adapter, to what a serving engine runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from fourbit.config import DataSettings, RunConfig
from fourbit.errors import ConfigError
from fourbit.exporting import provenance
from fourbit.exporting.bnb import Requantized, write_bnb
from fourbit.exporting.card import model_card
from fourbit.exporting.folder import check_output
from fourbit.exporting.folder import replace as replace_folder
from fourbit.exporting.hf import write_hf
from fourbit.exporting.merge import Merged, MergeReport, Target
from fourbit.exporting.origin import Origin, find_origin
from fourbit.exporting.serve import KINDS, serving_commands
from fourbit.exporting.streamed import Progress, Streamed, choose_dtype
from fourbit.model import tokenizer as tokenizers
from fourbit.model.base import open_base
from fourbit.private import owner_only

Kind = Literal["hf", "bnb", "gguf", "lora-gguf", "gptq", "awq"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    place        the folder or file
    bytes        of weights
    commands     what serves it, as typed in a shell
    merge        what was merged on the way, or None
    requantized  what quantizing to 4 bits cost, of a bitsandbytes checkpoint
    """

    place: Path
    kind: Kind
    bytes: int
    commands: list[str]
    merge: MergeReport | None = None
    requantized: Requantized | None = None

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "place": str(self.place)}


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked."""

    origin: Origin
    output: Path
    into: Target | None
    original: str | os.PathLike[str] | None
    dtype: str
    any_base: bool
    overwrite: bool
    progress: Progress | None

    def stream(self, dtype: str | None) -> Streamed:
        """The model to write; in no dtype where the writer rounds, so that it is done once."""
        return self.origin.streamed(dtype, self.into, self.original, self.any_base, self.progress)


@owner_only()
def merge(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    into: Target | None = None,
    original: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    any_base: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Merge an adapter into its base and write the result as a Hugging Face folder.

    source    a run folder, or the base that `adapter` was trained on
    into      "original", "dequantized" (4-bit weights restored), or None: original when at hand
    original  the 16-bit model or .gguf file, where the base is a 4-bit checkpoint
    dtype     "bfloat16", "float16" or "float32" of the result
    any_base  accept a base whose content is not the one the adapter's record names

    Streams: a few tensors are in memory, never the model. Raises ConfigError or ModelError in one line;
    nothing is written then.
    """
    choose_dtype(dtype)
    origin = find_origin(source, adapter)
    check_output(Path(output), overwrite, origin.sources)
    merged = origin.merged(dtype, into, original, any_base, progress)
    size = write_hf(merged, output, overwrite=overwrite, progress=progress)
    return Exported(Path(output), "hf", size, serving_commands("hf", Path(output)), merged.report)


@owner_only()
def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: Kind,
    adapter: str | os.PathLike[str] | None = None,
    quant: str | None = None,
    into: Target | None = None,
    original: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    any_base: bool = False,
    data: Sequence[str] = (),
    group_size: int | None = None,
    install: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a run, a model with an adapter, or a model alone in a format that a serving engine reads.

    source      a run folder, or a model: a folder, hub name, 4-bit checkpoint or .gguf file
    to          "hf" 16-bit safetensors, "bnb" 4-bit, "gguf", "lora-gguf" (the adapter alone), "gptq", "awq"
    quant       of a gguf: F32, F16, BF16, Q8_0, Q4_0, Q4_K_M, ...; F16 when not given
    dtype       of hf, and of what bnb, gptq and awq leave unquantized; bfloat16 when not given
    data        rows to calibrate gptq and awq on; a run's training rows when not given
    group_size  of gptq and awq: weights that share a scale; the largest that fits when not given
    install     make the environment that gptq and awq need, where there is none

    An adapter is merged on the way; `into`, `original` and `any_base` are those of `fourbit.merge`.
    Raises ConfigError, DataError or ModelError in one line; nothing is written then.
    """
    _check_request(to, Path(output), quant, dtype, bool(data or group_size or install))
    chosen = dtype or "bfloat16"
    choose_dtype(chosen)
    origin = find_origin(source, adapter)
    check_output(Path(output), overwrite, origin.sources)
    request = _Request(origin, Path(output), into, original, chosen, any_base, overwrite, progress)
    if to == "hf":
        return _to_hf(request)
    if to == "bnb":
        return _to_bnb(request)
    if to == "gguf":
        return _to_gguf(request, quant or "F16")
    if to == "lora-gguf":
        return _to_lora_gguf(request)
    return _to_compressed(request, to, data, {"group_size": group_size, "install": install})


def _check_request(to: str, output: Path, quant: str | None, dtype: str | None, calibrated: bool) -> None:
    if to not in KINDS:
        raise ConfigError(f"export to '{to}': must be one of {', '.join(KINDS)}")
    if quant is not None and to != "gguf":
        raise ConfigError(f"quant {quant} is for gguf; {to} has none to choose")
    if dtype is not None and to in ("gguf", "lora-gguf"):
        raise ConfigError(f"dtype is not for {to}; choose the quant of a gguf, such as F16 or Q8_0")
    if calibrated and to not in ("gptq", "awq"):
        raise ConfigError(f"calibration rows, group size and install are for gptq and awq, not for {to}")
    if to in ("gguf", "lora-gguf") and output.suffix != ".gguf":
        raise ConfigError(f"{output}: {to} is one file; name it {output.name}.gguf")


def _to_hf(request: _Request) -> Exported:
    model = request.stream(request.dtype)
    step = provenance.make_step("export", [], {"to": "hf", "dtype": request.dtype})
    size = write_hf(
        model,
        request.output,
        overwrite=request.overwrite,
        steps=(*model.chain, step),
        progress=request.progress,
    )
    return _exported(request, "hf", size, model)


def _to_bnb(request: _Request) -> Exported:
    model = request.stream(None)
    run = request.origin.run
    scheme: dict[str, Any] = {}
    if run is not None and run.model.quant_type in ("nf4", "fp4"):
        scheme = run.model.model_dump(include={"quant_type", "block_size", "double_quant"})
    result = write_bnb(
        model,
        request.output,
        **scheme,
        dtype=choose_dtype(request.dtype),
        overwrite=request.overwrite,
        progress=request.progress,
    )
    return _exported(request, "bnb", result.bytes, model, result)


def _to_gguf(request: _Request, quant: str) -> Exported:
    from fourbit.exporting.gguf.write import write_gguf

    def progress(done: int, total: int) -> None:
        if request.progress is not None:
            request.progress("write the file", done, total)

    model = request.stream(None)
    write_gguf(model.tensors, model.config, model.tokenizer(), request.output, quant, progress)
    step = provenance.make_step("export", [], {"to": "gguf", "quant": quant})
    provenance.write(request.output, (*model.chain, step))
    return _exported(request, "gguf", request.output.stat().st_size, model)


def _to_lora_gguf(request: _Request) -> Exported:
    adapter = request.origin.adapter
    if adapter is None:
        raise ConfigError("lora-gguf writes an adapter: give a run folder, or a model and an adapter")
    from fourbit.exporting.gguf.lora import write_lora_gguf

    write_lora_gguf(adapter, open_base(request.origin.base).config, request.output)
    step = provenance.make_step("export", [provenance.describe("adapter", adapter)], {"to": "lora-gguf"})
    provenance.write(request.output, (*provenance.read(adapter), step))
    return _exported(request, "lora-gguf", request.output.stat().st_size, None)


def _to_compressed(
    request: _Request, method: Literal["gptq", "awq"], data: Sequence[str], options: dict[str, Any]
) -> Exported:
    run = request.origin.run
    if run is None and not data:
        raise ConfigError(f"{method} is calibrated on rows; give them with --calibrate")
    from fourbit.exporting.compressed import CALIBRATION_ROWS, quantize_for_serving

    model = request.stream(request.dtype)
    rows = _calibration_rows(run, data, model.tokenizer(), CALIBRATION_ROWS)
    request.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=request.output.parent, prefix=".export-") as work:
        whole, made = Path(work) / "model", Path(work) / request.output.name
        write_hf(model, whole, progress=request.progress)
        result = quantize_for_serving(whole, made, rows, method=method, progress=request.progress, **options)
        settings = {"to": method, "group_size": result.group_size, "calibration_rows": len(rows)}
        step = provenance.make_step("export", [], settings, {"bytes": result.bytes})
        chain = (*model.chain, replace(step, versions={**step.versions, **result.versions}))
        provenance.write(made, chain)
        card = model_card(model, request.output.name, method, chain)
        (made / "README.md").write_text(card, encoding="utf-8")
        replace_folder(made, request.output)
    return _exported(request, method, result.bytes, model)


def _calibration_rows(
    run: RunConfig | None, data: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[list[int]]:
    """Token ids of rows drawn by seed, held-out rows never among them."""
    from fourbit.data.cache import encode_files
    from fourbit.data.encode import sample, split_rows

    tokenizers.ensure_pad_token(tokenizer)
    settings = run.data if run is not None else DataSettings(train=tuple(data))
    examples = encode_files(data or settings.train, tokenizer, settings)[0].examples
    seed = run.train.seed if run is not None else 0
    if not data and not settings.heldout:
        examples, _ = split_rows(examples, settings.heldout_fraction, seed)
    return [list(example.input_ids) for example in sample(examples, count, seed)]


def _exported(
    request: _Request,
    kind: Kind,
    size: int,
    model: Streamed | None,
    requantized: Requantized | None = None,
) -> Exported:
    report = model.report if isinstance(model, Merged) else None
    commands = serving_commands(kind, request.output)
    return Exported(request.output, kind, size, commands, report, requantized)
