"""The `fourbit::` operator library and the choice between native code, Triton and the reference.

Operators are defined with torch.library (schema, implementation, fake, autograd), so that they trace under
torch.compile and export. On a CPU they run native code where it is loaded, on a GPU Triton's kernels where
these work, and the reference otherwise, with one notice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fourbit import reference
from fourbit.codebooks import codebook, thresholds
from fourbit.kernels import native

LIBRARY = torch.library.Library("fourbit", "DEF")
#: Where Triton's kernels run; its interpreter takes CPU tensors too.
_TRITON_DEVICES = ("cuda",)


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator by its implementation for every device and its fake for tracing."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fourbit::{name}", fake, lib=LIBRARY)


def runs_native(tensor: Tensor) -> bool:
    """Whether operators on this tensor run native code."""
    return tensor.device.type == "cpu" and _native_loaded()


@cache
def _native_loaded() -> bool:
    if native.available():
        return True
    _notice("the native library is not used", native.load_error())
    return False


def runs_triton(tensor: Tensor) -> bool:
    """Whether operators on this tensor run Triton's kernels."""
    return tensor.device.type in _TRITON_DEVICES and _triton_works(tensor.device)


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether kernels compile for this card and give the reference's bytes: a small tensor is tried."""
    reason = triton_error(device)
    if reason is not None:
        _notice(f"Triton is not used on {device}", reason)
    return reason is None


def triton_error(device: torch.device) -> str | None:
    """Why Triton's kernels are not used on a device, or None: a small tensor is quantized and compared."""
    try:
        from fourbit.kernels.gpu import codec
    except ImportError as error:
        return str(error)
    values = codebook("nf4", device)
    w = torch.linspace(-3, 3, 1001, device=device)
    codes = torch.empty(501, dtype=torch.uint8, device=device)
    try:
        absmax = codec.quantize_4bit(w, *thresholds(values), 64, codes)
    except Exception as error:  # a compiler's errors are of many classes
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    wanted = reference.quantize_4bit(w, values, 64)
    same = torch.equal(codes, wanted[0]) and torch.equal(absmax, wanted[1])
    return None if same else "its codes are not the reference's"


def _notice(what: str, why: str | None) -> None:
    logging.getLogger("fourbit").warning(
        "%s, the reference runs instead, slower and with the same results: %s", what, why
    )
