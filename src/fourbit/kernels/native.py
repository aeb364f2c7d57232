"""The C++ library, loaded through ctypes: its one table of signatures; the modules beside this one call it.

The library (csrc/fourbit.h describes it) knows nothing of Python and torch. It is found in the folder
that the environment variable FOURBIT_NATIVE names, or else beside this package, and loaded at first
use; after torch, so that both share one OpenMP runtime. FOURBIT_ISA picks an instruction set other
than the best this machine has.

Its functions take CPU tensors whose sizes and dtypes the operators have checked, and release the interpreter
lock.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fourbit.errors import ConfigError

_ABI = 7
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
    "fb_rms_norm": (_I, [_P, _P, _I, _N, _N, _P, c_float, _P, _P, _P, _I]),
    "fb_rms_norm_grad": (_I, [*[_P] * 5, _I, _N, _N, _P, _P, _P, _I]),
    "fb_gated": (_I, [_P, _P, _I, _N, _I, _P, _I]),
    "fb_gated_grad": (_I, [_P, _P, _P, _I, _N, _I, _P, _P, _I]),
    "fb_rotary": (_I, [_P, _I, *[_N] * 7, _P, _P, _N, _I, _P, _I]),
    "fb_cross_entropy": (_I, [_P, _I, _N, _N, _P, c_float, c_float, _I, _P, _I]),
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
