"""NaN and infinity in weights, found before they turn a run or an answer into noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourbit.errors import ModelError
from fourbit.nn.packed import packed_parts
from fourbit.ops import find_nonfinite
from fourbit.ops.codec import FLOATS


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise ModelError beginning with `where` for a NaN or an infinity, with its position."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    flat = (tensor if tensor.dtype in FLOATS else tensor.float()).detach().reshape(-1)
    first = find_nonfinite(flat)
    if first >= 0:
        position = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]
        raise ModelError(
            f"{where} has {flat[first].item()} at {position}; repair the file or download it again"
        )


def check_stored(tensor: Tensor, where: str) -> None:
    """Raise ModelError beginning with `where` unless a tensor holds finite floating-point numbers."""
    if not tensor.is_floating_point():
        raise ModelError(f"{where} is stored as {tensor.dtype}, which holds no weights")
    check_finite(tensor, where)


def check_model(model: nn.Module, source: str) -> None:
    """Raise ModelError for a weight, or a scale of a 4-bit weight, that is not finite."""
    for name, parameter in model.named_parameters():
        check_finite(parameter, f"{source}: '{name}'")
    for packed in packed_parts(model):
        for matrix in packed.matrices():
            q = matrix.quantized()
            for part, scales in (
                ("absmax", q.absmax),
                ("nested_absmax", q.nested_absmax),
                ("offset", q.offset),
            ):
                if scales is not None:
                    check_finite(scales, f"{source}: {part} of '{packed.name}'")
