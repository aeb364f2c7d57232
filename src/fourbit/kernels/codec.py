"""The codec's native functions, and the product of few rows with a packed weight.

The codec gives the same bytes as `fourbit.reference`; the product sums and approximates in its own way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.codebooks import dynamic_map, dynamic_thresholds
from fourbit.kernels.native import DTYPES, address, check, library
from fourbit.tensor import NESTED_BLOCK_SIZE


def find_nonfinite(w: Tensor) -> int:
    """Flat position of the first NaN or infinity of the contiguous w (fp32, bf16, fp16), or -1."""
    found: int = library().fb_find_nonfinite(
        w.data_ptr(), DTYPES[w.dtype], w.numel(), torch.get_num_threads()
    )
    return found


def quantize_4bit(w: Tensor, thresholds: Tensor, order: Tensor, block_size: int, codes: Tensor) -> Tensor:
    """Quantize the contiguous w of n values with `codebooks.thresholds`: (fp32 [15], uint8 [16]).

    Fills codes, uint8 [ceil(n / 2)], and returns absmax, fp32 [ceil(n / block_size)]. The absmax of a block
    that holds a NaN or an infinity is not finite, and its codes mean nothing.
    """
    n = w.numel()
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device="cpu")
    status = library().fb_quantize_4bit(
        w.data_ptr(),
        DTYPES[w.dtype],
        n,
        block_size,
        thresholds.data_ptr(),
        order.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "quantize_4bit")
    return absmax


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """Restore out.numel() values into the contiguous `out`, fp32, bf16 or fp16.

    absmax is fp32 [b], or uint8 [b] with nested_absmax fp32 [ceil(b / 256)] and offset fp32 [].
    """
    codes, absmax = codes.contiguous(), absmax.contiguous()
    status = library().fb_dequantize_4bit(
        codes.data_ptr(),
        absmax.data_ptr(),
        address(nested_absmax),
        address(offset),
        dynamic_map().data_ptr(),
        out.numel(),
        block_size,
        codebook.data_ptr(),
        out.data_ptr(),
        DTYPES[out.dtype],
        torch.get_num_threads(),
    )
    check(status, "dequantize_4bit")


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization of the contiguous absmax fp32 [b].

    Returns codes8 uint8 [b], nested_absmax fp32 [ceil(b / 256)] and offset fp32 [].
    """
    blocks = absmax.numel()
    codes8 = torch.empty(blocks, dtype=torch.uint8, device="cpu")
    nested_absmax = torch.empty(-(-blocks // NESTED_BLOCK_SIZE), dtype=torch.float32, device="cpu")
    offset = torch.empty((), dtype=torch.float32, device="cpu")
    status = library().fb_quantize_absmax(
        absmax.data_ptr(),
        blocks,
        dynamic_thresholds().data_ptr(),
        codes8.data_ptr(),
        nested_absmax.data_ptr(),
        offset.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "quantize_absmax")
    return codes8, nested_absmax, offset


def dequantize_absmax(codes8: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Restore absmax fp32 [b] from double quantization."""
    codes8, nested_absmax = codes8.contiguous(), nested_absmax.contiguous()
    absmax = torch.empty(codes8.numel(), dtype=torch.float32, device="cpu")
    status = library().fb_dequantize_absmax(
        codes8.data_ptr(),
        nested_absmax.data_ptr(),
        offset.data_ptr(),
        dynamic_map().data_ptr(),
        codes8.numel(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "dequantize_absmax")
    return absmax


def linear_4bit(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Multiply the contiguous x [M, K], few rows, by the packed weight [out_features, K] transposed.

    Returns x's dtype [M, out_features]; bias has x's dtype too. Sums are fp32 and rounded once, at the
    end; so are weights, but bf16 for bf16 inputs with avx512bf16 and amx. A row of the result does not depend
    on what the other rows are, nor on how many, but for one row alone of bf16 with amx.
    """
    codes, absmax = codes.contiguous(), absmax.contiguous()
    y = torch.empty(x.shape[0], out_features, dtype=x.dtype, device="cpu")
    status = library().fb_linear_4bit(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        x.shape[1],
        out_features,
        codes.data_ptr(),
        absmax.data_ptr(),
        address(nested_absmax),
        address(offset),
        dynamic_map().data_ptr(),
        block_size,
        codebook.data_ptr(),
        address(bias),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "linear_4bit")
    return y
