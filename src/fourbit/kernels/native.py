"""The C++ library, loaded through ctypes: one table of signatures and a thin function for each.

The library (csrc/fourbit.h describes it) knows nothing of Python and torch. It is found in the folder
that the environment variable FOURBIT_NATIVE names, or else beside this package, and loaded at first
use; after torch, so that both share one OpenMP runtime. FOURBIT_ISA picks an instruction set other
than the best this machine has.

The functions take CPU tensors whose sizes and dtypes the operators have checked, and release the
interpreter lock. Codec and dropout give the same bytes as `fourbit.reference`; the few-row product, norms
and activations sum and approximate in their own way.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fourbit.codebooks import dynamic_map, dynamic_thresholds
from fourbit.errors import ConfigError
from fourbit.kernels.pool import POOL
from fourbit.tensor import NESTED_BLOCK_SIZE

_ABI = 5
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Strided(ctypes.Structure):
    """FbAttentionTensor of csrc/fourbit.h."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64))


class _Attention(ctypes.Structure):
    """FbAttention of csrc/fourbit.h."""

    _fields_ = (
        *((name, _Strided) for name in ("q", "k", "v", "o", "grad", "dq", "dk", "dv")),
        ("first", c_void_p),
        ("lse", c_void_p),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "length", "width")),
        ("scale", c_float),
        ("dtype", c_int),
    )


# name: result, arguments. Pointers are addresses (None is null); sizes are int64; the last int of a
# kernel is its number of threads.
_P, _I, _N = c_void_p, c_int, c_int64
_SIGNATURES = {
    "fb_abi": (_N, []),
    "fb_isa": (c_char_p, []),
    "fb_isas": (c_char_p, []),
    "fb_set_isa": (_I, [c_char_p]),
    "fb_find_nonfinite": (_N, [_P, _I, _N, _I]),
    "fb_quantize_4bit": (_I, [_P, _I, _N, _N, _P, _P, _P, _P, _I]),
    "fb_dequantize_4bit": (_I, [_P, _P, _P, _P, _P, _N, _N, _P, _P, _I, _I]),
    "fb_quantize_absmax": (_I, [_P, _N, _P, _P, _P, _P, _I]),
    "fb_dequantize_absmax": (_I, [_P, _P, _P, _P, _N, _P, _I]),
    "fb_linear_4bit": (_I, [_P, _I, _N, _N, _N, _P, _P, _P, _P, _P, _N, _P, _P, _P, _I]),
    "fb_has_product": (_I, [_I]),
    "fb_product": (_I, [_P, _I]),
    "fb_product_grad": (_I, [_P, _I]),
    "fb_decode": (_I, [_P, _I]),
    "fb_dense": (_I, [_P, _P, _I, _N, _N, _N, _P, _I]),
    "fb_dropout": (_I, [_P, _I, _N, _N, _P, _P, _N, _N, _N, c_double, _P, _I]),
    "fb_rms_norm": (_I, [_P, _I, _N, _N, _P, c_float, _P, _P, _I]),
    "fb_rms_norm_grad": (_I, [_P, _P, _I, _N, _N, _P, _P, _P, _I]),
    "fb_gated": (_I, [_P, _P, _I, _N, _I, _P, _I]),
    "fb_gated_grad": (_I, [_P, _P, _P, _I, _N, _I, _P, _P, _I]),
    "fb_adamw": (_I, [_P, _P, _P, _P, _N, _P, _I]),
    "fb_adamw_8bit": (_I, [_P, _P, _P, _P, _P, _P, _N, _P, _P, _P, _I]),
    "fb_attention": (_I, [_P, _I]),
    "fb_attention_grad": (_I, [_P, _I]),
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    folder = Path(os.environ.get("FOURBIT_NATIVE") or Path(__file__).parent.parent)
    found = sorted(
        path for path in folder.glob("fourbit_native*") if path.suffix in (".so", ".dylib", ".dll")
    )
    if not found:
        return None, f"no fourbit_native library in {folder}; build it with `pip install .` or cmake"
    try:
        library = ctypes.CDLL(str(found[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{found[0]} cannot be used: {error}"
    if (abi := library.fb_abi()) != _ABI:
        return None, f"{found[0]} has interface {abi} and this fourbit needs {_ABI}; build it again"
    return library, ""


@cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises RuntimeError where there is none."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the native library is not loaded: {reason}")
    if wanted := os.environ.get("FOURBIT_ISA"):
        _choose(library, wanted, "FOURBIT_ISA")
    return library


def available() -> bool:
    """Whether the library is there and loads.

    Raises ConfigError if FOURBIT_ISA names an instruction set that this machine does not have.
    """
    return _load()[0] is not None and library() is not None


def load_error() -> str | None:
    """Why the library is not available, or None."""
    return _load()[1] or None


def isa() -> str:
    """The instruction set in use."""
    return _text(library().fb_isa())


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine and this build have, best last."""
    return tuple(_text(library().fb_isas()).split())


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process.

    Raises ConfigError for one that this machine or this build does not have.
    """
    _choose(library(), name, "set_isa")


def _choose(library: ctypes.CDLL, name: str, where: str) -> None:
    if library.fb_set_isa(name.encode()):
        known = ", ".join(_text(library.fb_isas()).split())
        raise ConfigError(f"{where}: instruction set '{name}' is not available here; use one of {known}")


def _text(value: bytes) -> str:
    return value.decode("ascii")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process; more than one compete for the cores.

    Empty where the system has no /proc.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's values begin; None for none."""
    return None if tensor is None else tensor.data_ptr()


def check(status: int, name: str) -> None:
    """Raise for what a function of the library returned."""
    if status == 2:
        raise MemoryError(f"there is no memory for the scratch of {name}")
    if status:
        raise RuntimeError(f"{name} refused its arguments; the operator should have checked them")


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
    end; so are weights, but bf16 for bf16 inputs with avx512bf16. A row of the result does not depend on
    the other rows.
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


def dropout(x: Tensor, row: Tensor, position: Tensor, layer: int, seed: int, step: int, p: float) -> Tensor:
    """Drop elements of the contiguous x [T, K] with probability p and scale the kept ones.

    row and position are int64 [T]; the mask is a function of them, the column, layer, seed and step
    (see `reference.dropout_mask`), so calling this on the gradient is the backward pass.
    """
    y = POOL.empty(x.shape, x.dtype)
    status = library().fb_dropout(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        x.shape[1],
        row.contiguous().data_ptr(),
        position.contiguous().data_ptr(),
        layer,
        seed,
        step,
        p,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "dropout")
    return y


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x weight / sqrt(mean(x^2) + eps) of the contiguous x [T, K] with weight fp32 [K].

    Returns y in x's dtype, rounded once, and the factor of each row, fp32 [T], for backward.
    """
    y = POOL.empty(x.shape, x.dtype)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    status = library().fb_rms_norm(
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.shape,
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "rms_norm")
    return y, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient in x; grad and x are contiguous, [T, K], of one dtype."""
    grad_x = POOL.empty(x.shape, x.dtype)
    status = library().fb_rms_norm_grad(
        grad.data_ptr(),
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.shape,
        weight.data_ptr(),
        scale.data_ptr(),
        grad_x.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "rms_norm_backward")
    return grad_x


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """activation(gate) * up of contiguous tensors of one shape and dtype; kind as in csrc/fourbit.h."""
    out = POOL.empty(gate.shape, gate.dtype)
    status = library().fb_gated(
        gate.data_ptr(),
        up.data_ptr(),
        DTYPES[gate.dtype],
        gate.numel(),
        kind,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "gated")
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """The gradients in gate and up."""
    grad_gate, grad_up = POOL.empty(gate.shape, gate.dtype), POOL.empty(up.shape, up.dtype)
    status = library().fb_gated_grad(
        grad.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        DTYPES[gate.dtype],
        gate.numel(),
        kind,
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "gated_backward")
    return grad_gate, grad_up


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention: q [B, H, T, D], k and v [B, Hkv, T, D] of one dtype, last dimensions contiguous.

    first: contiguous int32 [B, T]; query t sees keys first[t] to t. D is at most 256.
    Returns o [B, H, T, D], which lies in memory as [B, T, H, D], and the fp32 [B, H, T] that backward needs.
    """
    batch, heads, length, width = q.shape
    o = POOL.empty((batch, length, heads, width), q.dtype).transpose(1, 2)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device="cpu")
    problem = _problem(q, k, v, o, first, lse, scale)
    check(library().fb_attention(ctypes.addressof(problem), torch.get_num_threads()), "attention")
    return o, lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in q, k and v, of their shapes and strides."""
    grads = tuple(POOL.empty_like(x) for x in (q, k, v))
    problem = _problem(q, k, v, o, first, lse, scale)
    problem.grad, problem.dq, problem.dk, problem.dv = map(_strided, (grad, *grads))
    check(library().fb_attention_grad(ctypes.addressof(problem), torch.get_num_threads()), "attention")
    return grads[0], grads[1], grads[2]


def _problem(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, first: Tensor, lse: Tensor, scale: float
) -> _Attention:
    batch, heads, length, width = q.shape
    return _Attention(
        *map(_strided, (q, k, v, o)),
        *(_Strided() for _ in range(4)),
        first.data_ptr(),
        lse.data_ptr(),
        batch,
        heads,
        k.shape[1],
        length,
        width,
        scale,
        DTYPES[q.dtype],
    )


def _strided(x: Tensor) -> _Strided:
    return _Strided(x.data_ptr(), *x.stride()[:3])
