"""`fourbit.plan`: what a run will use, asked in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fourbit.config import DataSettings, LoraSettings, ModelSettings, TrainSettings
from fourbit.config_file import place, resolve
from fourbit.memory.plan import Plan
from fourbit.memory.sizes import parse_size
from fourbit.training.planner import plan_run


def plan(
    model: str,
    data: str | Sequence[str] = "data.jsonl",
    *,
    memory: str | int | None = None,
    device: str | None = None,
    **settings: Any,
) -> Plan:
    """What a run will use, before anything is loaded; only configuration and headers are read.

    model     a folder, hub name or .gguf file; config.json alone will do
    data      not read
    memory    a budget, such as "24GB" or a number of bytes, for which the fastest plan that fits is chosen
    device    cpu, cuda, or a card's name such as "rtx-4090", which need not be here
    settings  keys of ModelSettings, LoraSettings, DataSettings and TrainSettings: r=64, max_length=512, ...

    Raises MemoryBudgetError where nothing fits, and ConfigError or ModelError in one line.
    """
    files = [data] if isinstance(data, str) else list(data)
    tree: dict[str, Any] = {"model": {"path": model}, "lora": {}, "data": {"train": files}, "train": {}}
    place(tree, settings, _SECTIONS, "fourbit.plan")
    budget = parse_size(memory) if isinstance(memory, str) else memory
    return plan_run(resolve(tree, "fourbit.plan"), budget, device)


_SECTIONS: dict[str, type[ModelSettings | LoraSettings | DataSettings | TrainSettings]] = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "data": DataSettings,
    "train": TrainSettings,
}
