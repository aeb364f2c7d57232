"""The `fourbit::` operator library and the choice between native code and the reference.

Operators are defined with torch.library (schema, implementation, fake, autograd), so that they trace
under torch.compile and export. On a CPU they run native code where it is loaded, and the reference
otherwise, with one notice; on every other device they run the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fourbit.kernels import native

LIBRARY = torch.library.Library("fourbit", "DEF")


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
    logging.getLogger("fourbit").warning(
        "the native library is not used, the reference runs instead, slower and with the same results: %s",
        native.load_error(),
    )
    return False
