"""The native steps of AdamW, with 32- and 8-bit states; the same bytes as `fourbit.reference`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fourbit.codebooks import dynamic_map, dynamic_thresholds
from fourbit.kernels.native import check, library


def adamw(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, coefficients: Tensor) -> None:
    """One step of AdamW on contiguous fp32 [n], in place (`reference.adamw`)."""
    pointers = (tensor.data_ptr() for tensor in (weight, grad, mean, square))
    threads = torch.get_num_threads()
    status = library().fb_adamw(*pointers, weight.numel(), coefficients.data_ptr(), threads)
    check(status, "adamw")


def adamw_8bit(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    mean_absmax: Tensor,
    square: Tensor,
    square_absmax: Tensor,
    coefficients: Tensor,
) -> None:
    """The same with blockwise 8-bit states (`reference.adamw_8bit`)."""
    maps, thresholds = _dynamic_tables()
    pointers = (tensor.data_ptr() for tensor in (weight, grad, mean, mean_absmax, square, square_absmax))
    status = library().fb_adamw_8bit(
        *pointers,
        weight.numel(),
        coefficients.data_ptr(),
        maps.data_ptr(),
        thresholds.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "adamw_8bit")


@cache
def _dynamic_tables() -> tuple[Tensor, Tensor]:
    """(fp32 [2, 256] the signed and the unsigned dynamic map, [2, 255] their thresholds)."""
    return (
        torch.stack([dynamic_map(signed=True), dynamic_map(signed=False)]),
        torch.stack([dynamic_thresholds(signed=True), dynamic_thresholds(signed=False)]),
    )
