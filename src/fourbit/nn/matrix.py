"""A matrix kept in 4 bits: what it is restored to, and products with it.

`Linear4bit` is one with a module around it; a mixture of experts has many in one parameter (`nn.experts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit.codebooks import codebook as builtin_codebook
from fourbit.functional import dequantize_4bit, linear_4bit
from fourbit.kernels import product as native
from fourbit.memory.tracker import has_values
from fourbit.ops.linear import multiplies_panels
from fourbit.tensor import NESTED_BLOCK_SIZE, QuantizedTensor


def packed_sizes(numel: int, block_size: int, double_quant: bool) -> dict[str, int]:
    """Bytes of the parameters that hold a matrix of so many weights, by the ending of their names."""
    blocks = -(-numel // block_size)
    sizes = {"": (numel + 1) // 2, "_absmax": blocks if double_quant else 4 * blocks}
    return sizes | ({"_consts": 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4} if double_quant else {})


def packed_bytes(q: QuantizedTensor) -> dict[str, Tensor]:
    """The bytes of a quantized matrix by the ending of the parameter that holds them; codes are shared."""
    parts = {"": q.codes.view(-1), "_absmax": q.absmax.view(torch.uint8)}
    if q.nested_absmax is not None and q.offset is not None:
        parts["_consts"] = torch.cat([q.nested_absmax, q.offset.view(1)]).view(torch.uint8)
    return parts


class PackedMatrix:
    """A frozen matrix [out_features, in_features] in 4 bits, with the bias of its layer or None.

    weight         uint8 [ceil(n / 2)]        codes, n = out_features * in_features
    weight_absmax  uint8 [b] or [4 b]         scale codes; the bytes of fp32 scales without double_quant
    weight_consts  uint8 [4 ceil(b/256) + 4]  bytes of fp32 nested_absmax, then of offset; None without
    compute_dtype  dtype of products; None computes in x's dtype
    dtype          of the bias and of what `dequantize` returns; the weight's original one
    """

    in_features: int
    out_features: int
    quant_type: str
    block_size: int
    double_quant: bool
    compute_dtype: torch.dtype | None
    dtype: torch.dtype
    weight: Tensor
    weight_absmax: Tensor
    weight_consts: Tensor | None
    bias: Any  # a Tensor or None; torch does not say so of its own layer
    _custom_codebook: Tensor | None = None
    __call__: Callable[..., Any]  # forward, with the hooks of a module where this is one

    @property
    def codebook(self) -> Tensor:
        """fp32 [16] on the weight's device."""
        if self._custom_codebook is not None:
            return self._custom_codebook.to(self.weight.device)
        return builtin_codebook(self.quant_type, self.weight.device)

    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares memory with the parameters."""
        absmax, nested_absmax, offset = self._scales()
        return QuantizedTensor(
            codes=self.weight.detach(),
            absmax=absmax,
            shape=(self.out_features, self.in_features),
            dtype=self.dtype,
            quant_type=self.quant_type,
            block_size=self.block_size,
            codebook=self.codebook,
            nested_absmax=nested_absmax,
            offset=offset,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The restored weight [out_features, in_features], by default in its original dtype."""
        return dequantize_4bit(self.quantized(), dtype)

    def forward(self, x: Tensor, adapter: native.Adapter | None = None) -> Any:
        """Map x [.., in_features] to [.., out_features], differentiable in x and bias.

        With an adapter, where `adapts(x)`: y and what gradients need (`kernels.product`), not differentiable.
        """
        if adapter is not None:
            return self._adapted(x, adapter)
        if self.compute_dtype is None:
            return linear_4bit(x, self.quantized(), self.bias)
        return linear_4bit(x.to(self.compute_dtype), self.quantized(), self.bias).to(x.dtype)

    def adapts(self, x: Tensor) -> bool:
        """Whether one native product does all for rows x [T, ..]: this layer's, an adapter's, its dropout."""
        own_dtype = self.compute_dtype in (None, x.dtype)
        return own_dtype and multiplies_panels(x, self.in_features * self.out_features)

    def _adapted(self, x: Tensor, adapter: native.Adapter) -> tuple[Tensor, Tensor]:
        if not has_values(x):
            return x.new_empty(len(x), self.out_features), x.new_empty(len(x), len(adapter.a))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y, low = native.product(
            x.contiguous(), self.packed(), bias, adapter, few=len(x) <= native.few_rows(x.dtype)
        )
        assert low is not None
        return y, low

    def packed(self) -> native.Packed:
        """The weight as native products take it."""
        absmax, nested_absmax, offset = self._scales()
        return native.Packed(
            self.out_features,
            self.in_features,
            self.weight,
            absmax,
            nested_absmax,
            offset,
            self.codebook,
            self.block_size,
        )

    def _scales(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        absmax = self.weight_absmax.detach()
        if self.weight_consts is None:
            return _as_fp32(absmax), None, None
        constants = _as_fp32(self.weight_consts.detach())
        return absmax, constants[:-1], constants[-1]


def _as_fp32(data: Tensor) -> Tensor:
    # A reader may hand out a slice of a file that does not start on a multiple of four bytes. (A
    # compiler cannot trace the question; there, torch refuses such a view.)
    if not torch.compiler.is_compiling() and data.storage_offset() % 4:
        data = data.clone()
    return data.view(torch.float32)
