"""The commands that serve an export."""

from __future__ import annotations

import shlex
from pathlib import Path

#: What `fourbit export --to` writes.
KINDS = ("hf", "bnb", "gguf", "lora-gguf", "gptq", "awq")


def serving_commands(kind: str, place: str | Path) -> list[str]:
    """Command lines, as typed in a shell, that serve an export of one of the KINDS."""
    path = shlex.quote(str(place))
    name = shlex.quote(Path(place).stem.lower())
    if kind == "gguf":
        return [
            f"llama-server -m {path}",
            f"echo FROM {shlex.quote(str(Path(place).resolve()))} > Modelfile "
            f"&& ollama create {name} -f Modelfile && ollama run {name}",
        ]
    if kind == "lora-gguf":
        return [f"llama-server -m BASE.gguf --lora {path}"]
    if kind == "fourbit":
        return [f"fourbit chat {path}"]
    return [f"vllm serve {path}"]
