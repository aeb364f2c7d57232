"""GPTQ and AWQ for GPU serving engines: 4-bit integers in compressed-tensors format, by llm-compressor.

fourbit renders and tokenizes the calibration rows, checks the group size against the layers, and copies
the tokenizer unchanged; `workers/llmcompressor_worker.py` quantizes, in an environment of its own
(`environment.py`). What it wrote takes its final name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fourbit.errors import ConfigError, ExportError, ModelError
from fourbit.exporting.environment import WORKERS, find_environment, own_variables

METHODS = ("gptq", "awq")
#: Those that vLLM's Marlin kernels read (MARLIN_SUPPORTED_GROUP_SIZES), best first: fewer scales to store.
GROUP_SIZES = (128, 64, 32)
#: Calibration rows: 512 is llm-compressor's default for rows of 2,048 tokens; those of a task are shorter.
CALIBRATION_ROWS = 256

WORKER = WORKERS / "llmcompressor_worker.py"
#: What makes text of token ids, and generation of a model: taken over as it is.
_COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
           "chat_template.*", "generation_config.json", "LICENSE*")  # fmt: skip

#: Called with what is being done, how much of it is done, and how much there is.
StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ServingExport:
    """What was written. layers: quantized linear layers; bytes: of weights; versions: of what computed."""

    folder: str
    method: str
    group_size: int
    layers: int
    bytes: int
    versions: dict[str, str]

    @property
    def command(self) -> str:
        """What serves it."""
        return f"vllm serve {self.folder}"


def quantize_for_serving(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    calibration: Sequence[Sequence[int]],
    *,
    method: str = "gptq",
    group_size: int | None = None,
    python: str | os.PathLike[str] | None = None,
    install: bool = False,
    progress: StageProgress | None = None,
) -> ServingExport:
    """Quantize a 16-bit model folder to 4-bit integers, scales calibrated on rows of token ids.

    calibration  rows as the model is trained on them, chat template and all
    method       "gptq": symmetric, errors of earlier columns put right in later ones (arXiv:2210.17323);
                 "awq": with zero points, after scaling up what large activations meet (arXiv:2306.00978)
    group_size   weights of a row that share a scale; default the largest of GROUP_SIZES that fits every layer
    python       interpreter with llm-compressor; default see `environment.find_environment`
    install      make an environment where there is none: downloads up to 3 GB

    Raises ConfigError, ModelError or ExportError before anything long starts, and ExportError with the
    worker's reason when it fails; then nothing is left at `output`.
    """
    source, target = Path(folder), Path(output)
    if method not in METHODS:
        raise ConfigError(f"method = '{method}': use {' or '.join(METHODS)}")
    if not calibration:
        raise ConfigError(f"{method} is calibrated on rows, and there are none; give training data")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not empty; choose another folder")
    layers, head = linear_layers(source)
    size = choose_group_size(layers, group_size)
    environment = find_environment(python, install, progress)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        request = {
            "folder": str(source.resolve()),
            "output": str(Path(work) / "model"),
            "method": method,
            "group_size": size,
            "ignore": [head] if head is not None else [],
            "calibration": [list(ids) for ids in calibration],
        }
        result = _run(environment.python, request, Path(work), target, method, progress)
        if result["layers"] != len(layers):
            raise ExportError(
                f"{source}: llm-compressor quantized {result['layers']} of {len(layers)} linear layers, "
                "so part of the model would stay at 16 bits; this architecture cannot be exported so"
            )
        made = Path(work) / "model"
        _copy_tokenizer(source, made)
        if target.exists():
            target.rmdir()
        made.rename(target)
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return ServingExport(str(output), method, size, result["layers"], written, result["versions"])


def linear_layers(folder: Path) -> tuple[dict[str, int], str | None]:
    """Inputs of each linear layer of a model folder by name, without the output head, and the head's name.

    Raises ModelError for a folder that is no 16-bit model.
    """
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json here; give a 16-bit model folder")
    try:
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{folder}: is already quantized; give the 16-bit model")
    head = model.get_output_embeddings()
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head_name = next((name for name, module in found.items() if module is head), None)
    return {name: module.in_features for name, module in found.items() if module is not head}, head_name


def choose_group_size(layers: dict[str, int], wanted: int | None) -> int:
    """The wanted group size if every layer's inputs divide by it, else the largest that fits.

    Raises ConfigError naming a layer that does not divide, and the sizes that fit all.
    """
    fitting = [size for size in GROUP_SIZES if all(inputs % size == 0 for inputs in layers.values())]
    sizes = ", ".join(map(str, GROUP_SIZES))
    if wanted is not None and wanted not in GROUP_SIZES:
        raise ConfigError(f"group size {wanted}: serving engines read {sizes}")
    if not fitting or (wanted is not None and wanted not in fitting):
        size = wanted if wanted is not None else GROUP_SIZES[-1]
        name, inputs = next((name, inputs) for name, inputs in layers.items() if inputs % size)
        way = f"use {fitting[0]}" if fitting else f"none of {sizes} divides them all; export as gguf or bnb"
        raise ConfigError(f"group size {size} does not divide the {inputs:,} inputs of {name}; {way}")
    return wanted if wanted is not None else fitting[0]


def _run(
    python: Path,
    request: dict[str, Any],
    work: Path,
    target: Path,
    method: str,
    progress: StageProgress | None,
) -> dict[str, Any]:
    """The worker's result. Its own words are kept beside the output when it fails."""
    asked, log = work / "request.json", work / "log.txt"
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [str(python), str(WORKER), str(asked)]
    variables = {**own_variables(), "HF_HUB_OFFLINE": "1"}
    result: dict[str, Any] | None = None
    reason: str | None = None
    with (
        log.open("w", encoding="utf-8") as words,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, env=variables, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for message in _messages(process.stdout):
                if "error" in message:
                    reason = str(message["error"])
                elif "total" in message and progress is not None:
                    progress(method, message["done"], message["total"])
                elif "layers" in message:
                    result = message
        except BaseException:  # an interrupt: nobody will read what else it does
            process.kill()
            raise
    code = process.returncode
    if code == 0 and result is not None:
        return result
    kept = target.with_name(f"{target.name}.log")
    shutil.copy(log, kept)
    if reason is None:
        stopped = f"signal {-code}; out of memory?" if code < 0 else f"exit code {code}"
        reason = f"stopped without a word, {stopped}"
    raise ExportError(f"{method}: llm-compressor failed ({reason}); what it printed is in {kept}")


def _messages(stream: IO[str]) -> Iterator[dict[str, Any]]:
    """The protocol's lines; what else is printed is passed over."""
    for line in stream:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict):
            yield message


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern)}):
        if file.is_file():
            shutil.copy(file, target)
