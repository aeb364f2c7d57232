"""Few distinct sizes, so that compiled kernels are few.

oneDNN generates code for every new shape of a bf16 product and keeps it: about 0.7 MB each, and a
training step has some thirty kinds of products. Batches whose padded length takes any value fill
hundreds of megabytes with code (docs/log.md). Rounding sizes up to four per power of two bounds it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rounded_size(n: int) -> int:
    """The smallest of ..., 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, ... at least n (n itself up to 8)."""
    if n <= 8:
        return n
    step = 1 << ((n - 1).bit_length() - 3)
    return -(-n // step) * step


def with_rounded_rows(x: Tensor) -> Tensor:
    """x [M, K], with rows of zeros below it up to a rounded M where that matters: bf16 on a CPU."""
    missing = rounded_size(x.shape[0]) - x.shape[0]
    if missing == 0 or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return x
    return F.pad(x, (0, 0, 0, missing))
