"""Writing a streamed model as a Hugging Face folder of 16-bit safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from fourbit.exporting import provenance
from fourbit.exporting.card import model_card
from fourbit.exporting.folder import check_output, written_aside
from fourbit.exporting.shards import SHARD_BYTES, ShardWriter
from fourbit.exporting.streamed import Progress, Streamed, file_tensors
from fourbit.model.base import Base

#: Beside weights and config.json: what a model folder may hold that a reader of it needs.
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template*", "additional_chat_templates", "generation_config.json",
    "*.py",
)  # fmt: skip


def write_hf(
    model: Streamed,
    folder: str | os.PathLike[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    datasets: Sequence[str] = (),
    steps: Sequence[provenance.Step] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write weights, config, tokenizer, chat template, model card and record; one tensor in memory at a time.

    shard_bytes  largest size of a weight file
    datasets     names for the card
    steps        the record to write, if not the model's own

    Returns the bytes of weights. The folder appears when it is complete, and not before. Raises
    ConfigError for a folder that holds something, ModelError when the disk refuses or a value does not
    fit the dtype.
    """
    target = Path(folder)
    check_output(target, overwrite, [model.base.path])
    with written_aside(target) as partial:
        size = _write_weights(model, partial, shard_bytes, progress)
        write_config(model.config, partial, model.dtype or torch.float32)
        write_companions(model.base, partial)
        chain = model.chain if steps is None else steps
        provenance.write(partial, chain)
        (partial / "README.md").write_text(
            model_card(model, target.name, "hf", chain, datasets), encoding="utf-8"
        )
    return size


def write_config(config: PretrainedConfig, folder: Path, dtype: torch.dtype, **extra: object) -> None:
    """The config.json of a model, with further entries such as quantization_config."""
    tree = {**config.to_dict(), **extra}
    tree["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(tree, indent=2, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_companions(base: Base, folder: Path) -> None:
    """Tokenizer, chat template and generation settings: the base's files as they are, or out of its GGUF."""
    if base.is_gguf:
        from fourbit.model.formats.gguf import read_tokenizer

        read_tokenizer(base.path).save_pretrained(str(folder))
        return
    for file in sorted({file for pattern in _COMPANIONS for file in base.path.glob(pattern)}):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
        elif file.name == "additional_chat_templates":
            shutil.copytree(file, folder / file.name)


def _write_weights(model: Streamed, folder: Path, shard_bytes: int, progress: Progress | None) -> int:
    tensors = file_tensors(model)
    writer = ShardWriter(folder, tensors, shard_bytes)
    try:
        for number, (name, tensor) in enumerate(tensors.items(), start=1):
            writer.add(name, tensor.read())
            if progress is not None:
                progress("write weights", number, len(tensors))
        return writer.finish()
    finally:
        writer.abandon()
