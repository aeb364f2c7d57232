"""Several adapters on one base in memory, of which one at a time is on, or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fourbit.errors import ConfigError
from fourbit.model.adapters import load_adapter

#: What the base without an adapter is called.
BASE = "base"


class AdapterSet:
    """A base and the adapters that were added to it, by name; switching loads nothing."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._model: PreTrainedModel | PeftModel = base
        self._peft_names: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order in which they were added."""
        return tuple(self._peft_names)

    def add(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Put one more adapter on the base; it stays off.

        Raises ConfigError for a name that is taken, ModelError for an adapter that does not fit.
        """
        if not name or name == BASE or name in self._peft_names:
            taken = "is the base's" if name == BASE else "is given twice" if name else "is empty"
            raise ConfigError(f"the adapter name '{name}' {taken}; name adapters as NAME=FOLDER")
        # PEFT refuses names with dots, and takes weights for missing where a name is part of 'lora_'.
        peft_name = f"adapter{len(self._peft_names)}"
        self._model = load_adapter(self._model, folder, name=peft_name)
        self._peft_names[name] = peft_name

    @contextmanager
    def using(self, name: str) -> Iterator[nn.Module]:
        """The model with this adapter on, or with none for `BASE`."""
        if not isinstance(self._model, PeftModel):
            yield self._model
        elif name == BASE:
            with self._model.disable_adapter():
                yield self._model
        else:
            self._model.set_adapter(self._peft_names[name], inference_mode=True)
            yield self._model
