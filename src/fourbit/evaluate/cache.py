"""A KV cache with room to grow.

transformers' dynamic cache makes every layer's keys and values anew for each token. Here a layer owns a
buffer with room for the next few slots and writes into it; what transformers sees is the used part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

#: Slots by which a buffer grows.
_STEP = 32


class RoomyLayer(DynamicLayer):
    """keys and values [B, heads, S, head_dim]: views of buffers of at least S slots."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, heads, T, head_dim] to both; returns all there is."""
        if not self.is_initialized:
            self.set(key_states[:, :, :0], value_states[:, :, :0])
        assert self.keys is not None
        assert self.values is not None
        keys, self._key_room = _append(self.keys, self._key_room, key_states)
        values, self._value_room = _append(self.values, self._value_room, value_states)
        self.keys, self.values = keys, values
        return keys, values

    def set(self, keys: Tensor, values: Tensor) -> None:
        """Begin with tensors that others may own: they are copied before anything is appended."""
        self.keys, self.values, self._key_room, self._value_room = keys, values, None, None
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def claim(self) -> tuple[Tensor, Tensor]:
        """Count one more slot as used, which the caller writes; both buffers, [B, heads, room, head_dim]."""
        assert self.keys is not None
        assert self.values is not None
        length = self.keys.shape[2] + 1
        self._key_room = _room(self.keys, self._key_room, length)
        self._value_room = _room(self.values, self._value_room, length)
        self.keys, self.values = self._key_room[:, :, :length], self._value_room[:, :, :length]
        return self._key_room, self._value_room

    def truncate(self, length: int) -> None:
        """Keep the first `length` slots."""
        if self.is_initialized and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


def empty_cache() -> DynamicCache:
    """A cache that makes its layers as a model first calls them."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = RoomyLayer
    return cache


def changed_cache(cache: DynamicCache, change: Callable[[Tensor], Tensor]) -> DynamicCache:
    """A cache whose layers begin with `change` of this one's keys and values."""
    copy = empty_cache()
    layers: list[Any] = cache.layers
    for layer in layers:
        new = RoomyLayer()
        new.set(change(layer.keys), change(layer.values))
        copy.layers.append(new)
    return copy


def _append(used: Tensor, room: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """The used slots followed by the new ones, and the buffer that holds them."""
    length = used.shape[2]
    total = length + new.shape[2]
    room = _room(used, room, total)
    room[:, :, length:total] = new
    return room[:, :, :total], room


def _room(used: Tensor, room: Tensor | None, total: int) -> Tensor:
    """A buffer that begins with the used slots and has at least `total`."""
    if room is None or room.shape[2] < total:
        room = used.new_empty(*used.shape[:2], -(-total // _STEP) * _STEP, used.shape[3])
        room[:, :, : used.shape[2]] = used
    return room
