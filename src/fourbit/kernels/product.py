"""The many-row product with a packed weight and an adapter, and its gradients, in C++.

Takes CPU tensors whose sizes and dtypes the callers have checked. The weight, A and B are taken in x's dtype;
sums are fp32 and rounded once, at the end. A row of the result does not depend on the other rows.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.codebooks import dynamic_map
from fourbit.kernels import native
from fourbit.kernels.pool import POOL

#: Up to so many rows, codes as they lie are faster than panels (`few_rows`).
FEW_ROWS = 16
#: With AMX: codes are looked up once for two tiles of 16 rows each.
FEW_ROWS_AMX = 32


class Product(ctypes.Structure):
    """FbProduct of csrc/fourbit.h."""

    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("rows", "in_features", "out_features")),
        ("dtype", c_int),
        *((name, c_void_p) for name in ("codes", "absmax", "nested_absmax", "offset", "map")),
        ("block_size", c_int64),
        *((name, c_void_p) for name in ("codebook", "bias", "y")),
        ("few", c_int),
        ("rank", c_int64),
        *((name, c_void_p) for name in ("a", "b")),
        ("scaling", c_float),
        *((name, c_void_p) for name in ("low", "row", "position")),
        *((name, c_int64) for name in ("layer", "seed", "step")),
        ("p", c_double),
        *((name, c_void_p) for name in ("grad", "grad_x", "grad_a", "grad_b")),
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [out_features, in_features] as its parts (`ops.codec`), contiguous."""

    out_features: int
    in_features: int
    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    codebook: Tensor
    block_size: int


@dataclass(frozen=True, slots=True)
class Dropout:
    """Keys of a dropout mask (`reference.dropout_mask`): row and position int64 [M], contiguous."""

    row: Tensor
    position: Tensor
    layer: int
    seed: int
    step: int
    p: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A fp32 [r, in_features] and B fp32 [out_features, r], contiguous, and the factor of their product.

    dropout: of the input
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: Dropout | None = None


def has_product(dtype: torch.dtype) -> bool:
    """Whether the instruction set in use has this product for this dtype."""
    return bool(native.library().fb_has_product(native.DTYPES[dtype]))


def few_rows(dtype: torch.dtype) -> int:
    """Up to so many rows are multiplied faster with the packed codes as they lie (`codec.linear_4bit`)."""
    return FEW_ROWS_AMX if dtype == torch.bfloat16 and native.isa() == "amx" else FEW_ROWS


def product(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None = None,
    adapter: Adapter | None = None,
    *,
    few: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x [M, in_features] times the weight transposed, plus bias, plus what the adapter adds.

    x is contiguous, bias of x's dtype. With few, for a few rows, the base's part is what `codec.linear_4bit`
    gives, and the adapter's is added to it. Returns y [M, out_features] and, with an adapter, what gradients
    need: low = dropout(x) A^T [M, r]; both of x's dtype.
    """
    y = POOL.empty((x.shape[0], weight.out_features), x.dtype)
    low = None if adapter is None else torch.empty(x.shape[0], len(adapter.a), dtype=x.dtype, device="cpu")
    problem = problem_of(weight, adapter, x.shape[0], x.dtype)
    problem.x, problem.bias, problem.y = x.data_ptr(), native.address(bias), y.data_ptr()
    problem.low, problem.few = native.address(low), few
    status = native.library().fb_product(ctypes.addressof(problem), torch.get_num_threads())
    native.check(status, "a 4-bit product")
    return y, low


def product_grad(
    grad: Tensor,
    weight: Packed,
    adapter: Adapter | None = None,
    *,
    x: Tensor | None = None,
    low: Tensor | None = None,
    needs_x: bool = True,
    needs_adapter: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in x, of its dtype, and in A and B, fp32; None where not needed.

    grad is contiguous, [M, out_features]; the adapter's gradients need the x and low of `product`.
    """
    rows, dtype = grad.shape[0], grad.dtype
    grad_x = POOL.empty((rows, weight.in_features), dtype) if needs_x else None
    grad_a = torch.empty_like(adapter.a) if adapter is not None and needs_adapter else None
    grad_b = torch.empty_like(adapter.b) if adapter is not None and needs_adapter else None
    problem = problem_of(weight, adapter, rows, dtype)
    problem.x, problem.low, problem.grad = native.address(x), native.address(low), grad.data_ptr()
    problem.grad_x = native.address(grad_x)
    problem.grad_a, problem.grad_b = native.address(grad_a), native.address(grad_b)
    status = native.library().fb_product_grad(ctypes.addressof(problem), torch.get_num_threads())
    native.check(status, "the gradient of a 4-bit product")
    return grad_x, grad_a, grad_b


def problem_of(weight: Packed, adapter: Adapter | None, rows: int, dtype: torch.dtype) -> Product:
    """Without what is read and written. Tensors are contiguous, and must stay alive: it holds addresses."""
    problem = Product(
        rows=rows,
        in_features=weight.in_features,
        out_features=weight.out_features,
        dtype=native.DTYPES[dtype],
        codes=weight.codes.data_ptr(),
        absmax=weight.absmax.data_ptr(),
        nested_absmax=native.address(weight.nested_absmax),
        offset=native.address(weight.offset),
        map=dynamic_map().data_ptr(),
        block_size=weight.block_size,
        codebook=weight.codebook.data_ptr(),
    )
    if adapter is not None:
        problem.a, problem.b = adapter.a.data_ptr(), adapter.b.data_ptr()
        problem.rank, problem.scaling = len(adapter.a), adapter.scaling
        if (dropout := adapter.dropout) is not None:
            problem.row, problem.position = dropout.row.data_ptr(), dropout.position.data_ptr()
            problem.layer, problem.seed, problem.step = dropout.layer, dropout.seed, dropout.step
            problem.p = dropout.p
    return problem
