"""What a model's settings claim, before memory or time is taken for it.

A config of a few bytes can name a billion layers or an embedding of terabytes. Layers are counted before
transformers reads the config (which makes lists as long), modules while it builds the empty model, and
parameters against the bytes that the files really hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isnan, prod
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from fourbit.errors import ModelError
from fourbit.model.formats.lazy import LazyTensor

#: The deepest published models have 200 layers, and the largest mixtures of experts 80,000 modules.
MOST_LAYERS, MOST_MODULES = 2_000, 250_000
#: Parameters for a byte on disk: two in 4 bits, and a tied head counts twice.
_MOST_PER_BYTE = 4

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def check_numbers(file: Path, config: Any) -> None:
    """Raise ModelError for a parsed config.json with an absurd number of layers or a NaN, at any level."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key in _LAYERS:
                check_layer_count(file, key, value)
            if isinstance(value, float) and isnan(value):
                raise ModelError(f"{file}: {key} is NaN; download it again")
            check_numbers(file, value)


def check_layer_count(file: Path, key: str, value: Any) -> None:
    """Raise ModelError for a number of layers that no model has."""
    if isinstance(value, int | float) and not 0 <= value <= MOST_LAYERS:
        raise ModelError(f"{file}: {key} is {value}; models have up to {MOST_LAYERS:,} layers")


@contextmanager
def modules_counted(source: Path) -> Iterator[None]:
    """Raise ModelError in a block that builds more modules than any model has."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ModelError(f"{source}: the config describes more than {MOST_MODULES:,} layers and experts")

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_total(source: Path, skeleton: PreTrainedModel, stored: Mapping[str, LazyTensor]) -> None:
    """Raise ModelError if the model has many more parameters than its files can hold."""
    wanted = sum(prod(parameter.shape) for parameter in skeleton.parameters())
    held = sum(prod(tensor.shape or ()) * tensor.dtype.itemsize for tensor in stored.values())
    if wanted > _MOST_PER_BYTE * held:
        raise ModelError(
            f"{source}: the config describes {wanted:,} parameters and the files hold {held:,} bytes; "
            "they do not belong together"
        )
