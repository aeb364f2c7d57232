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
from functools import partial
from typing import Any

from torch import Tensor, nn

from fourbit.memory.mapped import MappedFile, Span

_ATTRIBUTE = "fourbit_stream"


class LayerStream:
    """Reads the mapped weights of decoder layers ahead and releases them, as forward passes come by.

    layers  in the order in which a forward pass takes them
    files   that hold some of their parameters

    reading, waiting  seconds the thread has read, and those that computing had to wait for it
    bytes_read        by the thread, from the disk or the system's cache of it
    """

    def __init__(self, layers: Sequence[nn.Module], files: Sequence[MappedFile]) -> None:
        self._files = files
        self._spans = [_merged(self._spans_of(layer.parameters())) for layer in layers]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fourbit-weights")
        self._ahead: dict[int, Future[None]] = {}
        self._current = -1
        self.reading = self.waiting = 0.0
        self.bytes_read = 0
        # Not of the layer itself: transformers' activation checkpointing recomputes what is inside its hooks.
        self._hooks = [
            module.register_forward_pre_hook(partial(self._enter, number))
            for number, layer in enumerate(layers)
            for module in layer.modules()
            if self._spans_of(module.parameters(recurse=False))
        ]

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Let go of the memory of those that are mapped."""
        for span in self._spans_of(tensors):
            span.release()

    def close(self, model: nn.Module) -> None:
        """Bring the mapped parameters of a model into memory for good, and stop streaming them."""
        for hook in self._hooks:
            hook.remove()
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

    def _enter(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a layer computes: its weights are read, the next ones requested, the last ones let go."""
        if number == self._current:
            return
        mine = self._ahead.pop(number, None) or self._reader.submit(self._read, number)
        began = time.monotonic()
        mine.result()
        self.waiting += time.monotonic() - began
        if self._current >= 0:
            for span in self._spans[self._current]:
                span.release()
        following = self._following(number, module.training)
        self._current = number
        for other in [key for key in self._ahead if key != following]:
            self._ahead.pop(other).cancel()
        if following not in self._ahead:
            self._ahead[following] = self._reader.submit(self._read, following)

    def _following(self, number: int, training: bool) -> int:
        """The layer that probably comes after this one."""
        count = len(self._spans)
        if not training:  # not by the mode of gradients: an autograd function that calls a layer has them off
            return (number + 1) % count
        # Layers are recomputed downwards from the last one; after the first one begins a new pass upwards.
        down = number == count - 1 or 0 < number < self._current
        return max(0, number - 1) if down else min(count - 1, number + 1)

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


def stream_of(model: Any) -> LayerStream | None:
    """The stream of a model, or of the base below an adapter; None where all weights are in memory."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: LayerStream | None = getattr(base, _ATTRIBUTE, None)
    return found


def hold_weights(model: Any) -> None:
    """Bring weights that were on the disk into memory for good, if there are any."""
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
