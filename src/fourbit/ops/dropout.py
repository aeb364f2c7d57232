"""Dropout whose mask is a function of where a token is, not of when it is computed.

The definition is `reference.dropout_mask`. The mask is not kept: backward makes it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit import reference
from fourbit.errors import QuantizationError
from fourbit.kernels import elementwise as native_elementwise
from fourbit.ops.codec import check_float
from fourbit.ops.library import LIBRARY, define, runs_native, runs_triton


def _check(x: Tensor, p: float, rows: Tensor, positions: Tensor) -> None:
    check_float(x.dtype, "the input of dropout")
    if not p >= 0 or reference.dropped_of_65536(p) >= 65536:
        raise QuantizationError(f"dropout rate {p} is outside 0 <= p < 1")
    for name, keys in (("rows", rows), ("positions", positions)):
        if keys.dtype != torch.int64 or x.ndim != 2 or keys.shape != x.shape[:1]:
            raise QuantizationError(
                f"dropout of x [T, K] needs {name} int64 [T]; x has shape {list(x.shape)} and {name} "
                f"{list(keys.shape)} of {keys.dtype}"
            )


def _dropout(
    x: Tensor, p: float, rows: Tensor, positions: Tensor, layer: int, seed: int, step: int
) -> Tensor:
    _check(x, p, rows, positions)
    if runs_native(x):
        return native_elementwise.dropout(x.contiguous(), rows, positions, layer, seed, step, p)
    if runs_triton(x):
        from fourbit.kernels.gpu import dropout as gpu_dropout

        return gpu_dropout.dropout(x.contiguous(), rows, positions, layer, seed, step, p)
    return reference.keyed_dropout(x, p, rows, positions, layer, seed, step)


def _dropout_fake(
    x: Tensor, p: float, rows: Tensor, positions: Tensor, layer: int, seed: int, step: int
) -> Tensor:
    _check(x, p, rows, positions)
    return x.new_empty(x.shape)


define(
    "keyed_dropout(Tensor x, float p, Tensor rows, Tensor positions, int layer, int seed, int step) "
    "-> Tensor",
    _dropout,
    _dropout_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, rows, positions, *ctx.keys = inputs
    ctx.save_for_backward(rows, positions)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    again = torch.ops.fourbit.keyed_dropout(grad, ctx.p, *ctx.saved_tensors, *ctx.keys)
    return again, None, None, None, None, None, None


torch.library.register_autograd("fourbit::keyed_dropout", _differentiate, setup_context=_save, lib=LIBRARY)
