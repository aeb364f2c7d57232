"""fourbit: QLoRA from a checkpoint on disk to a served model, on one GPU or two CPU cores.

Names are imported on first use, so that `import fourbit` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load": "fourbit.model.load",
    "add_lora": "fourbit.model.adapters",
    "save_quantized": "fourbit.model.save",
    "plan": "fourbit.training.plan",
    "train": "fourbit.training.run",
    "merge": "fourbit.exporting.export",
    "export": "fourbit.exporting.export",
    "errors": "fourbit.errors",
    "FourBitConfig": "fourbit.integrations.transformers",
    "PagedAdamW": "fourbit.optim.adamw",
    "functional": "fourbit.functional",
}

__all__ = [
    "FourBitConfig",
    "PagedAdamW",
    "add_lora",
    "export",
    "functional",
    "load",
    "merge",
    "plan",
    "save_quantized",
    "train",
]


def __getattr__(name: str) -> Any:
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(f"module 'fourbit' has no attribute '{name}'")
    loaded = import_module(module)
    value = loaded if module == f"fourbit.{name}" else getattr(loaded, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
