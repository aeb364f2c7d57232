"""The quantized tensor: what the codec returns and every product reads.

Layout (bitsandbytes' bytes, see docs/method.md): the tensor is flattened row-major and cut into
blocks of `block_size` values, which may straddle rows; the last block may be short. Two 4-bit codes
share a byte, the first in the high nibble. Each block has one scale, `absmax`. With double
quantization (QLoRA, arXiv:2305.14314, section 3) the scales are themselves 8-bit codes, in blocks
of 256, after their mean `offset` was taken off.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

#: Scales that share one second-level constant (QLoRA section 3: "a block size of 256").
NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A 4-bit tensor of n values in b = ceil(n / block_size) blocks.

    codes          uint8 [ceil(n / 2)]    two codes a byte, the first in the high nibble
    absmax         fp32  [b]              block scales; uint8 [b] codes when double-quantized
    shape          the original shape
    dtype          the original floating dtype
    quant_type     "nf4", "fp4", "int4", or "custom"
    block_size     values per scale
    codebook       fp32  [16]             the value of each code, in code order
    nested_absmax  fp32  [ceil(b / 256)]  second-level scales, or None
    offset         fp32  []               mean of the first-level scales, or None
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: str
    block_size: int
    codebook: Tensor
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together (the codebook is shared and not counted)."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / n: 4.127 for block size 64 with double quantization (section 3)."""
        return 8 * self.nbytes / max(1, self.numel)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same bytes on another device."""
        return QuantizedTensor(
            codes=self.codes.to(device),
            absmax=self.absmax.to(device),
            shape=self.shape,
            dtype=self.dtype,
            quant_type=self.quant_type,
            block_size=self.block_size,
            codebook=self.codebook.to(device),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(device),
            offset=None if self.offset is None else self.offset.to(device),
        )
