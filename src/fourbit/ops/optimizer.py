"""One step of AdamW on runs of weights, by native code, Triton or the reference: the same bytes.

Plain functions and no operators of torch.library: optimizers are not traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from fourbit import reference
from fourbit.kernels import optimizer as native_optimizer
from fourbit.ops.library import runs_native, runs_triton

#: What a step is taken on; all contiguous.
Piece = tuple[Tensor, ...]


def adamw(pieces: Sequence[Piece]) -> None:
    """(weight, grad, mean, square, coefficients) of each piece: see `reference.adamw`."""
    if runs_triton(pieces[0][0]):
        from fourbit.kernels.gpu import optimizer as gpu_optimizer

        gpu_optimizer.adamw(pieces)
    else:
        for piece in pieces:
            _one_by_one(piece).adamw(*piece)


def adamw_8bit(pieces: Sequence[Piece]) -> None:
    """(weight, grad, mean, mean_absmax, square, square_absmax, coefficients): see `reference.adamw_8bit`."""
    if runs_triton(pieces[0][0]):
        from fourbit.kernels.gpu import optimizer as gpu_optimizer

        gpu_optimizer.adamw_8bit(pieces)
    else:
        for piece in pieces:
            _one_by_one(piece).adamw_8bit(*piece)


def _one_by_one(piece: Piece) -> ModuleType:
    return native_optimizer if runs_native(piece[0]) else reference
