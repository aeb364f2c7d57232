"""Copies of a result, one for each layer that reads it.

Where several layers read one tensor, autograd adds up their gradients one by one, each sum a pass and a
tensor of its own. Who makes such a tensor can hand out copies, which share its memory, and add up all that
comes back in a pass that it needs anyway. The copies are noted on the tensor; who does not know of them reads
the tensor itself, and no gradient is lost.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def with_copies(result: Tensor, copies: list[Tensor]) -> Tensor:
    """Note on a result the copies that its readers may take."""
    noted: Any = result
    noted.fourbit_copies = (result._version, copies)
    return result


def own_copy(tensor: Tensor) -> Tensor:
    """One of a tensor's copies that nobody has taken; the tensor itself where none is left, or it changed."""
    version, copies = getattr(tensor, "fourbit_copies", (None, None))
    return copies.pop() if copies and version == tensor._version else tensor
