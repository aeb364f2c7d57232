"""The model card of an export: README.md in the hub's format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fourbit.exporting import provenance
from fourbit.exporting.serve import serving_commands
from fourbit.exporting.streamed import Streamed
from fourbit.model.base import Base
from fourbit.model.formats import gguf

_LICENCE = ("license", "license_name", "license_link")
_HUB_URL = re.compile(r"https://huggingface\.co/(?P<name>[\w.-]+/[\w.-]+)/?$")
_HUB_CACHE = re.compile(r"models--(?P<owner>[\w.-]+)--(?P<name>[\w.-]+)")


def model_card(
    model: Streamed,
    name: str,
    kind: str,
    chain: Sequence[provenance.Step],
    datasets: Sequence[str] = (),
) -> str:
    """Front matter, what the model is made of, what was measured, and how to serve it.

    name      of the model, as a heading
    kind      one of `fourbit.exporting.serve.KINDS`
    datasets  hub names of what it was trained on
    """
    from huggingface_hub import ModelCardData

    known = base_facts(model.base)
    licence: dict[str, Any] = {key: known[key] for key in _LICENCE if key in known}
    tuned = any(step.kind in ("train", "merge") for step in chain)
    data = ModelCardData(
        base_model=known.get("base_model"),
        datasets=list(datasets) or None,
        library_name="transformers" if kind in ("hf", "bnb") else None,
        pipeline_tag="text-generation",
        tags=["fourbit", *(["qlora"] if tuned else []), *([] if kind in ("hf", "fourbit") else [kind])],
        **licence,
    )
    lines = ["---", data.to_yaml(), "---", "", f"# {name}", "", _origin(model, kind, chain), ""]
    if "license" in known:
        lines += [f"Licence: {known['license']}, the base model's.", ""]
    else:
        lines += ["Licence: the base model names none; see its source.", ""]
    measured = list(_measured(chain))
    if measured:
        lines += ["## Measured", "", "| step | figure | value |", "| --- | --- | ---: |", *measured, ""]
    lines += ["## Use", "", "```sh", *serving_commands(kind, name), "```", ""]
    lines += [f"How it was made, with versions and hashes of what went in: `{provenance.FILE}`.", ""]
    return "\n".join(lines)


def base_facts(base: Base) -> dict[str, str]:
    """The base's licence and its name on the hub, as far as its card or its GGUF metadata tell."""
    if base.is_gguf:
        facts = {"license": gguf.read_metadata(base.path, "general.license")}
        for key in ("general.base_model.0.repo_url", "general.repo_url"):
            match = _HUB_URL.match(gguf.read_metadata(base.path, key) or "")
            if match:
                facts["base_model"] = match["name"]
                break
        return {key: value for key, value in facts.items() if value}
    card = _front_matter(base.path / "README.md")
    found = {key: str(card[key]) for key in _LICENCE if card.get(key)}
    cached = _HUB_CACHE.search(str(base.path))
    if cached:
        found["base_model"] = f"{cached['owner']}/{cached['name']}"
    elif (base.path / provenance.FILE).exists() and isinstance(card.get("base_model"), str):
        found["base_model"] = card["base_model"]  # it is one of ours, and tells whose child it is
    return found


def _front_matter(path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError):  # no card, or one without front matter
        return {}


def _origin(model: Streamed, kind: str, chain: Sequence[provenance.Step]) -> str:
    base = model.base.path.stem if model.base.is_gguf else model.base.path.name
    form = {
        "hf": f"in {str(model.dtype or torch.float32).removeprefix('torch.')}",
        "bnb": "in 4 bits for bitsandbytes",
        "fourbit": "in 4 bits for fourbit, experts included",
        "gguf": "as GGUF",
        "gptq": "in 4 bits by GPTQ",
        "awq": "in 4 bits by AWQ",
    }[kind]
    merge = next((step for step in reversed(chain) if step.kind == "merge"), None)
    if merge is None:
        return f"{base}, {form}."
    settings = merge.settings
    into = "its original weights"
    if settings.get("into") == "dequantized":
        into = f"its weights restored from {settings['quantization']['quant_type']}"
    return f"{base} with a {settings.get('method', 'LoRA')} adapter merged into {into}, {form}."


def _measured(chain: Sequence[provenance.Step]) -> Iterator[str]:
    for step in chain:
        for figure, value in step.effect.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
            yield f"| {step.kind} | {figure.replace('_', ' ')} | {text} |"
