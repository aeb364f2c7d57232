"""One token for each of a few rows through all decoder layers, in C++ and in one call.

Takes CPU tensors whose sizes and dtypes the callers have checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.kernels import native
from fourbit.kernels.product import Adapter, Packed, Product, problem_of

#: Rows of `dense`, at most: more are faster in torch's tiles.
MOST_DENSE = 4


class _Linear(ctypes.Structure):
    """FbDecodeLinear of csrc/fourbit.h."""

    _fields_ = (("product", Product), ("up", c_void_p))


class _Layer(ctypes.Structure):
    """FbDecodeLayer."""

    _fields_ = (
        *((name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "output_norm", "q_norm", "k_norm", "keys", "values")),
        ("window", c_int64),
    )


class _Decode(ctypes.Structure):
    """FbDecode."""

    _fields_ = (
        ("layer", ctypes.POINTER(_Layer)),
        *(
            (name, c_int64)
            for name in (
                "layers",
                "rows",
                "hidden_size",
                "feed_forward",
                "heads",
                "kv_heads",
                "width",
                "slots",
                "room",
                "few_rows",
            )
        ),
        *((name, c_void_p) for name in ("hidden", "positions", "cos", "sin")),
        *((name, c_float) for name in ("eps", "scale")),
        *((name, c_int) for name in ("activation", "dtype")),
    )


@dataclass(frozen=True, slots=True)
class Linear:
    """A product of a layer: packed weight, a bias of the hidden states' dtype, an adapter without dropout."""

    weight: Packed
    bias: Tensor | None = None
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """The parts of a decoder layer; norms are fp32 weights, those of heads [width] or None.

    window: positions that a token sees, its own included; 0: all
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    input_norm: Tensor
    output_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """What the layers of a decoder share.

    activation  its number in `ops.elementwise.ACTIVATIONS`
    few_rows    up to so many are multiplied with the codes as they lie
    """

    hidden_size: int
    feed_forward: int
    heads: int
    kv_heads: int
    width: int
    eps: float
    scale: float
    activation: int
    few_rows: int
    dtype: torch.dtype


class Decoder:
    """Decoder layers whose addresses are laid out once, for many tokens."""

    def __init__(self, shape: Shape, layers: Sequence[Layer]) -> None:
        self._kept: list[object] = [shape, *layers]  # C++ holds addresses
        self._layers = (_Layer * len(layers))()
        for found, layer in zip(self._layers, layers, strict=True):
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                self._fill(getattr(found, name), getattr(layer, name), shape.dtype)
            for name in ("input_norm", "output_norm", "q_norm", "k_norm"):
                setattr(found, name, native.address(getattr(layer, name)))
            found.window = layer.window
        self._problem = _Decode(
            layer=self._layers,
            layers=len(layers),
            hidden_size=shape.hidden_size,
            feed_forward=shape.feed_forward,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            width=shape.width,
            few_rows=shape.few_rows,
            eps=shape.eps,
            scale=shape.scale,
            activation=shape.activation,
            dtype=native.DTYPES[shape.dtype],
        )

    def _fill(self, found: _Linear, linear: Linear, dtype: torch.dtype) -> None:
        found.product = problem_of(linear.weight, linear.adapter, 0, dtype)
        found.product.bias = native.address(linear.bias)
        if linear.adapter is not None:
            up = (linear.adapter.b.T * linear.adapter.scaling).contiguous()
            self._kept.append(up)
            found.up = up.data_ptr()

    def step(
        self,
        hidden: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        only: int | None = None,
    ) -> None:
        """Take hidden [B, H] through all layers in place; keys and values go into the cache's last used slot.

        only       the number of one layer to take instead
        positions  int64 [B, S]  of what the slots hold, the new token's the last; negative: nothing
        cos, sin   fp32 [B, width]
        caches     of each layer keys and values [B, kv_heads, room, width], room at least S
        """
        problem = self._problem
        for layer, (keys, values) in zip(self._layers, caches, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        first, problem.layers = (0, len(self._layers)) if only is None else (only, 1)
        problem.layer = ctypes.pointer(self._layers[first])
        problem.rows, problem.slots = positions.shape
        problem.room = caches[0][0].shape[2]
        problem.hidden, problem.positions = hidden.data_ptr(), positions.data_ptr()
        problem.cos, problem.sin = cos.data_ptr(), sin.data_ptr()
        status = native.library().fb_decode(ctypes.addressof(problem), torch.get_num_threads())
        native.check(status, "decoding")


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K] transposed, M from 1 to `MOST_DENSE`; contiguous, all of one dtype."""
    y = torch.empty(len(x), len(weight), dtype=x.dtype, device="cpu")
    status = native.library().fb_dense(
        x.data_ptr(),
        weight.data_ptr(),
        native.DTYPES[x.dtype],
        *x.shape,
        len(weight),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    native.check(status, "a product of few rows")
    return y
