"""The record of a run: what it was made from, with which settings, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import nn

from fourbit.config import DataSettings, RunConfig
from fourbit.data.read import located
from fourbit.exporting import provenance
from fourbit.memory.stream import stream_of
from fourbit.nn.packed import packed_parts

_EFFECT = ("stopped", "steps", "tokens", "best_step", "heldout_loss")


def held_as(model: nn.Module) -> dict[str, Any]:
    """How a model holds its base, as settings of `model`; empty for a codebook of the user's own."""
    packed = next((part.matrices()[0] for part in packed_parts(model)), None)
    if packed is None:
        return {"quant_type": "none"}
    if packed.quant_type == "custom":
        return {}
    stream = stream_of(model)
    return {
        "quant_type": packed.quant_type,
        "block_size": packed.block_size,
        "double_quant": packed.double_quant,
        "weight_tier": "device" if stream is None else stream.tier,
    }


def describe_sources(base: str, data: DataSettings, console: Console) -> list[provenance.Source]:
    """Base and data by content, before they are used. A base without a place on disk is left out."""
    roles = [("base", base)] if Path(base).exists() else []
    roles += [("data", str(path)) for path in located(data.train)]
    roles += [("heldout", str(path)) for path in located(data.heldout)]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("identify base and data")
        return [
            provenance.describe(role, path, lambda done, total: bar.update(task, completed=done, total=total))
            for role, path in roles
        ]


def write_record(
    folders: Sequence[Path],
    config: RunConfig,
    sources: Sequence[provenance.Source],
    summary: dict[str, Any],
) -> None:
    """Write the chain of the base, and training as its newest step, into those of the folders that exist."""
    bases = [source for source in sources if source.role == "base"]
    chain = provenance.read(Path(bases[0].path)) if bases else []
    effect = {key: summary[key] for key in _EFFECT if summary[key] is not None}
    chain.append(provenance.make_step("train", sources, config.model_dump(mode="json"), effect))
    for folder in folders:
        if folder.is_dir():
            provenance.write(folder, chain)
