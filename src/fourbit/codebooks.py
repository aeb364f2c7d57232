"""The values that codes stand for: NF4, FP4, INT4, codebooks of one's own, and the 8-bit dynamic map.

A 4-bit code stands for one of 16 values in [-1, 1]; the weight is that value times its block's absmax.
Quantizing picks the nearest value, found by comparing with the 15 midpoints of the sorted codebook.
The midpoints are computed in fp32 as bitsandbytes computes them on a CPU, because codes have to be
equal byte for byte; a value exactly on a midpoint takes the lower neighbour.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fourbit.defaults import BLOCK_SIZES
from fourbit.errors import QuantizationError, nearest

# NF4 (QLoRA, arXiv:2305.14314, section 3, "4-bit NormalFloat Quantization"). With Q the quantile
# function of N(0, 1) and p = ((1 - 1/32) + (1 - 1/30)) / 2 = 0.9677083: the positive half is Q at the
# first 8 of 9 evenly spaced points from p down to 1/2, the negative half -Q at the first 7 of 8 such
# points; with an exact zero and divided by the largest that makes 16. Equation 4 of the paper taken
# literally gives minus infinity at i = 0 and is used by nobody; these are bitsandbytes' fp32 values.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# FP4 as bitsandbytes defines it: bit 3 is the sign, and the other three bits, in order, stand for the
# values below over 12. It is not monotone in the code. Code 8 is zero again, and as bitsandbytes on a
# CPU has it, tiny positive values take it while tiny negative ones take code 0.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)

# Symmetric INT4: code c stands for (c - 7) / 7. Fifteen levels need fifteen codes; the sixteenth
# repeats the largest value and is never produced, since no scaled weight exceeds 1.
_INT4 = tuple(min(code - 7, 7) for code in range(16))

_VALUES = {"nf4": _NF4, "fp4": _FP4, "int4": _INT4}

#: Names of the built-in codebooks.
QUANT_TYPES = tuple(_VALUES)


def _fp32(*values: float) -> Tensor:
    # Explicit, because loaders build models under another default dtype or on the meta device, and a
    # table made then would stay wrong in the cache.
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def check_quant_type(quant_type: str) -> None:
    """Raise QuantizationError unless this is the name of a built-in codebook."""
    if quant_type not in _VALUES:
        known = ", ".join(QUANT_TYPES)
        hint = nearest(quant_type, QUANT_TYPES)
        raise QuantizationError(f"quant_type '{quant_type}' is unknown{hint}; use one of {known}")


# A compiler that traced this would build the table anew at every run.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def codebook(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The fp32 [16] values of a built-in codebook in code order. Shared: do not write to it.

    Raises QuantizationError for an unknown name.
    """
    check_quant_type(quant_type)
    return _codebook(quant_type, device)


@lru_cache(maxsize=64)
def _codebook(quant_type: str, device: torch.device | str) -> Tensor:
    with torch.inference_mode(False):
        values = _fp32(*_VALUES[quant_type])
        return (values / values.abs().max()).to(device)


def check_codebook(values: Tensor) -> Tensor:
    """A user's codebook as contiguous fp32 [16].

    Raises QuantizationError unless it has 16 finite values whose largest magnitude is 1.
    """
    if values.shape != (16,):
        raise QuantizationError(f"a codebook has 16 values, this one has shape {tuple(values.shape)}")
    values = values.detach().to(torch.float32).contiguous()
    largest = values.abs().max().item()
    if largest != 1.0:  # also true of NaN and infinity
        raise QuantizationError(
            f"the largest magnitude of a codebook must be 1, this one's is {largest}; divide it by that"
        )
    return values


def check_block_size(block_size: int) -> None:
    """Raise QuantizationError unless the codec has this block size."""
    if block_size not in BLOCK_SIZES:
        known = ", ".join(map(str, BLOCK_SIZES))
        raise QuantizationError(f"block_size {block_size} is not possible; use one of {known}")


def thresholds(values: Tensor) -> tuple[Tensor, Tensor]:
    """How to quantize to a codebook: (thresholds fp32 [15] ascending, order uint8 [16]).

    A scaled value above exactly k of the thresholds has the code order[k].
    """
    ascending, order = torch.sort(values, stable=True)
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


@lru_cache(maxsize=16)
def dynamic_map(device: torch.device | str = "cpu", signed: bool = True) -> Tensor:
    """The 8-bit dynamic data type, fp32 [256] ascending (Dettmers 2015, arXiv:1511.04561): signed for double
    quantization and AdamW's means, unsigned for its squares. Shared: do not write to it.

    For each exponent e in 0..-6 the interval [0.1, 1] is cut into 2^(6+e) equal parts (unsigned: 2^(7+e))
    whose midpoints, times 10^e and with both signs, are values; 0 and 1 complete them. Each step is rounded
    to fp32 as in bitsandbytes, whose torch.linspace runs from both ends with fused multiply-adds: fp64 here.
    """
    start = _fp32(0.1)
    found = [_fp32(0.0, 1.0)]
    for exponent in range(-6, 1):
        parts = 2 ** ((6 if signed else 7) + exponent)
        step = ((1.0 - start) / parts).double()
        steps = torch.arange(parts + 1, dtype=torch.float64, device="cpu")
        upward, downward = start.double() + step * steps, 1.0 - step * (parts - steps)
        edges = torch.where(steps < (parts + 1) // 2, upward, downward).float()
        middles = (edges[:-1] + edges[1:]) / 2 * _fp32(10.0**exponent)
        found += [middles, -middles] if signed else [middles]
    with torch.inference_mode(False):
        return torch.cat(found).sort().values.to(device)


@lru_cache(maxsize=16)
def dynamic_thresholds(device: torch.device | str = "cpu", signed: bool = True) -> Tensor:
    """Midpoints of the dynamic map, fp32 [255], rounded DOWN where fp32 cannot hold them.

    An fp32 value exceeds the rounded midpoint exactly when it exceeds the true one, so comparing in
    fp32 finds the nearest value without error.
    """
    values = dynamic_map(signed=signed).double()
    exact = (values[:-1] + values[1:]) / 2
    rounded = exact.float()
    below = torch.nextafter(rounded, _fp32(-torch.inf))
    with torch.inference_mode(False):
        return torch.where(rounded.double() > exact, below, rounded).to(device)
