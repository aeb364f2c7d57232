"""Frozen weights that stay in host memory: each decoder layer's are copied to the card before it computes.

The card holds two layers' packed weights: while one computes, the next one's are copied into the other place,
on a stream of their own, from pinned memory. The parameters of a layer that is not on the card are in host
memory, so that saving and hashing find them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.memory.visits import Visits

#: Each tensor begins at a multiple of so many bytes: copies and kernels like it, fp32 scales need four.
_ALIGNED = 256


@dataclass(frozen=True)
class _Layer:
    """The packed parameters of a layer, their bytes [start, end) in its buffer, and the buffer."""

    parameters: list[nn.Parameter]
    places: list[tuple[int, int]]
    host: Tensor

    def point_to(self, buffer: Tensor) -> None:
        """Have the parameters use these bytes."""
        for parameter, (start, end) in zip(self.parameters, self.places, strict=True):
            parameter.data = buffer[start:end]


class HostStream:
    """Keeps the packed weights of decoder layers in host memory, and copies them as forward passes come by.

    layers  in the order in which a forward pass takes them; their `uint8` parameters stay in host memory
    device  where they compute

    bytes_read        copied to the device
    reading, waiting  seconds: 0, since the host waits for no copy
    """

    tier = "host"

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._layers = [_moved(layer, device) for layer in layers]
        largest = max(layer.host.numel() for layer in self._layers)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._holds = [-1, -1]  # the layer in each place
        self._copied: list[Any] = [None, None]  # events: the copy into a place is done
        self._visits = Visits(layers, lambda module: bool(_packed(module, recurse=False)), self._enter)
        self.bytes_read = 0
        self.reading = self.waiting = 0.0

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Nothing: what is not computed with takes no memory of the device."""

    def close(self, model: nn.Module) -> None:
        """Bring the packed parameters to the device for good, and stop streaming them."""
        self._visits.end()
        for layer in self._layers:
            layer.point_to(layer.host.to(self.device))
        self._slots.clear()

    def _enter(self, number: int, before: int, following: int) -> None:
        """Before a layer computes: its weights are there, and the next one's on their way."""
        place = self._fetch(number, keep=before)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied[place])
        if before >= 0:
            self._layers[before].point_to(self._layers[before].host)
        self._layers[number].point_to(self._slots[place])
        self._fetch(following, keep=number)

    def _fetch(self, number: int, keep: int) -> int:
        """The place of a layer's weights, which are there or will be; that of the layer to keep is left."""
        if number in self._holds:
            return self._holds.index(number)
        place = 1 - self._holds.index(keep) if keep in self._holds else 0
        layer = self._layers[number]
        if self._copies is not None:
            # What has been computed with the weights in this place was asked for before now.
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with self._copying():
            self._slots[place][: layer.host.numel()].copy_(layer.host, non_blocking=True)
            if self._copies is not None:
                self._copied[place] = self._copies.record_event()
        self._holds[place] = number
        self.bytes_read += layer.host.numel()
        return place

    def _copying(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._copies is None else torch.cuda.stream(self._copies)


def _moved(layer: nn.Module, device: torch.device) -> _Layer:
    """A layer whose packed parameters lie one after another in host memory, pinned beside a card."""
    parameters = _packed(layer)
    places, size = [], 0
    for parameter in parameters:
        places.append((size, size + parameter.numel()))
        size += -(-parameter.numel() // _ALIGNED) * _ALIGNED
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for parameter, (start, end) in zip(parameters, places, strict=True):
        host[start:end].copy_(parameter.data.view(-1))
    found = _Layer(parameters, places, host)
    found.point_to(host)
    return found


def _packed(module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse=recurse) if p.dtype == torch.uint8]
