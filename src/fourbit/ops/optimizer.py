"""One step of AdamW on a run of weights, by native code or the reference: the same bytes.

Plain functions and no operators of torch.library: optimizers are not traced.
"""

from __future__ import annotations

from torch import Tensor

from fourbit import reference
from fourbit.kernels import optimizer as native_optimizer
from fourbit.ops.library import runs_native


def adamw(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, coefficients: Tensor) -> None:
    """See `reference.adamw`; all contiguous and fp32."""
    step = native_optimizer.adamw if runs_native(weight) else reference.adamw
    step(weight, grad, mean, square, coefficients)


def adamw_8bit(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    mean_absmax: Tensor,
    square: Tensor,
    square_absmax: Tensor,
    coefficients: Tensor,
) -> None:
    """See `reference.adamw_8bit`; all contiguous."""
    step = native_optimizer.adamw_8bit if runs_native(weight) else reference.adamw_8bit
    step(weight, grad, mean, mean_absmax, square, square_absmax, coefficients)
