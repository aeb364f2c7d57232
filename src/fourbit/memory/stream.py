"""Frozen weights that stay on the disk: each decoder layer's are there while it computes, and read before.

A 4-bit checkpoint holds the very bytes that products read, so its file is mapped and they are used in place.
A thread reads the next layer's while one computes: upwards in a forward pass, downwards while backward
recomputes the layers. What has been passed is let go: of the packed weights one layer is resident at a time,
and what else the system caches of the file it takes back when memory is wanted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.memory.host import HostStream
from fourbit.memory.mapped import MappedFile, Span
from fourbit.memory.visits import Visits

_ATTRIBUTE = "fourbit_stream"


class LayerStream:
    """Reads the mapped weights of decoder layers ahead and releases them, as forward passes come by.

    layers  in the order in which a forward pass takes them
    files   that hold some of their parameters

    reading, waiting  seconds the thread has read, and those that computing had to wait for it
    bytes_read        by the thread, from the disk or the system's cache of it
    """

    tier, device = "disk", torch.device("cpu")

    def __init__(self, layers: Sequence[nn.Module], files: Sequence[MappedFile]) -> None:
        self._files = files
        self._spans = [_merged(self._spans_of(layer.parameters())) for layer in layers]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fourbit-weights")
        self._ahead: dict[int, Future[None]] = {}
        self.reading = self.waiting = 0.0
        self.bytes_read = 0
        self._visits = Visits(
            layers, lambda module: bool(self._spans_of(module.parameters(recurse=False))), self._enter
        )

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Let go of the memory of those that are mapped."""
        for span in self._spans_of(tensors):
            span.release()

    def close(self, model: nn.Module) -> None:
        """Bring the mapped parameters of a model into memory for good, and stop streaming them."""
        self._visits.end()
        self._reader.shutdown()
        for parameter in model.parameters():
            span = self._span(parameter)
            if span is not None:
                parameter.data = parameter.data.clone()
                span.release()

    def _spans_of(self, tensors: Iterable[Tensor]) -> list[Span]:
        return [span for span in map(self._span, tensors) if span is not None]

    def _span(self, tensor: Tensor) -> Span | None:
        return next((span for file in self._files if (span := file.span(tensor))), None)

    def _enter(self, number: int, before: int, following: int) -> None:
        """Before a layer computes: its weights are read, the next ones requested, the last ones let go."""
        mine = self._ahead.pop(number, None) or self._reader.submit(self._read, number)
        began = time.monotonic()
        mine.result()
        self.waiting += time.monotonic() - began
        if before >= 0:
            for span in self._spans[before]:
                span.release()
        for other in [key for key in self._ahead if key != following]:
            self._ahead.pop(other).cancel()
        if following not in self._ahead:
            self._ahead[following] = self._reader.submit(self._read, following)

    def _read(self, number: int) -> None:
        began = time.monotonic()
        for span in self._spans[number]:
            span.read()
            self.bytes_read += span.size
        self.reading += time.monotonic() - began


def stream_weights(model: Any, layers: Sequence[nn.Module], files: Sequence[MappedFile]) -> LayerStream:
    """Stream a model's mapped weights from now on."""
    stream = LayerStream(layers, files)
    stream.release(model.parameters())  # what loading has touched
    setattr(model, _ATTRIBUTE, stream)
    return stream


def stream_from_host(model: Any, layers: Sequence[nn.Module], device: torch.device) -> HostStream:
    """Stream a model's packed weights from host memory from now on; all else of it goes to the device."""
    stream = HostStream(layers, device)
    streamed = {id(p) for layer in layers for p in layer.parameters() if p.dtype == torch.uint8}
    for parameter in model.parameters():
        if id(parameter) not in streamed:
            parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    setattr(model, _ATTRIBUTE, stream)
    return stream


def stream_of(model: Any) -> LayerStream | HostStream | None:
    """The stream of a model, or of the base below an adapter; None where all weights are in memory."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: LayerStream | HostStream | None = getattr(base, _ATTRIBUTE, None)
    return found


def hold_weights(model: Any) -> None:
    """Bring weights that were elsewhere to where they compute for good, if there are any."""
    stream = stream_of(model)
    if stream is not None:
        stream.close(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        delattr(base, _ATTRIBUTE)


def _merged(spans: list[Span]) -> list[Span]:
    """The same bytes in fewer spans, in the order of the files."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (str(span.file.path), span.begin)):
        # Between two tensors may lie a few bytes of others.
        if merged and merged[-1].file is span.file and span.begin - merged[-1].end < 4096:
            merged[-1] = Span(span.file, merged[-1].begin, max(span.end, merged[-1].end))
        else:
            merged.append(span)
    return merged
