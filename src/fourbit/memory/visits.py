"""Which decoder layer computes now, and which one probably comes next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

#: Called before a layer computes that is not the one that did last: (it, the one before or -1, the next one).
Enter = Callable[[int, int, int], None]


class Visits:
    """Watches decoder layers, in the order in which a forward pass takes them.

    watched  the modules of a layer to watch
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        watched: Callable[[nn.Module], bool],
        enter: Enter,
    ) -> None:
        self._count, self._enter, self._current = len(layers), enter, -1
        # Not of the layer itself: transformers' activation checkpointing recomputes what is inside its hooks.
        self._hooks = [
            module.register_forward_pre_hook(partial(self._visit, number))
            for number, layer in enumerate(layers)
            for module in layer.modules()
            if watched(module)
        ]

    def end(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()

    def _visit(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if number != self._current:
            following = self._following(number, module.training)
            self._enter(number, self._current, following)
            self._current = number

    def _following(self, number: int, training: bool) -> int:
        """The layer that probably comes after this one."""
        if not training:  # not by the mode of gradients: an autograd function that calls a layer has them off
            return (number + 1) % self._count
        # Layers are recomputed downwards from the last one; after the first one begins a new pass upwards.
        down = number == self._count - 1 or 0 < number < self._current
        return max(0, number - 1) if down else min(self._count - 1, number + 1)
