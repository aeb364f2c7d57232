"""How tensors are stored in a GGUF file: which type each gets, and its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourbit.errors import ConfigError, ModelError, nearest

#: Types that the gguf package writes.
DIRECT = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
#: Types that only llama.cpp itself can write, from a 16-bit file.
K_QUANTS = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
)  # fmt: skip

#: Values converted at a time, so that a large embedding is never whole in fp32.
_CHUNK = 1 << 24


def check_quant(quant: str) -> None:
    """Raise ConfigError for a type that is not known."""
    if quant not in DIRECT + K_QUANTS:
        known = ", ".join(DIRECT + K_QUANTS)
        raise ConfigError(
            f"quant: '{quant}' is not a GGUF type{nearest(quant, DIRECT + K_QUANTS)}; known: {known}"
        )


def file_type(quant: str) -> Any:
    """The number that stands for the whole file, as llama.cpp counts them."""
    from gguf import LlamaFileType

    name = "ALL_F32" if quant == "F32" else f"MOSTLY_{quant}"
    return LlamaFileType[name]


def tensor_type(name: str, shape: Sequence[int], quant: str, is_output: bool) -> Any:
    """The type of one tensor, as llama.cpp's own tools choose it.

    Vectors stay fp32. Rows that no block fits stay fp16. The matrix that makes the logits is never
    below 8 bits: it weighs most on quality.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[quant]
    if is_output and quant == "Q4_0":
        kind = GGMLQuantizationType.Q8_0
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F16
    return kind


def stored_bytes(shape: Sequence[int], kind: Any) -> int:
    """Bytes of a tensor of this shape and type."""
    from gguf import GGML_QUANT_SIZES

    values, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // values * size


def encode(values: Tensor, kind: Any, name: str) -> Iterator[np.ndarray[Any, Any]]:
    """A tensor's bytes in the file, uint8, in consecutive parts of whole rows.

    Raises ModelError for values that are not finite or that fp16 cannot hold.
    """
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield _encode_rows(rows[start : start + step], kind, name)


def _encode_rows(rows: Tensor, kind: Any, name: str) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType, quantize

    if not torch.isfinite(rows).all():
        raise ModelError(f"tensor '{name}' holds values that are not finite; nothing was exported")
    if kind == GGMLQuantizationType.BF16:
        return rows.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if kind == GGMLQuantizationType.F16:
        half = rows.to(torch.float16)
        if not torch.isfinite(half).all():
            raise ModelError(f"tensor '{name}' holds values beyond fp16's range; export as BF16 or F32")
        return half.contiguous().view(torch.uint8).numpy()
    encoded: np.ndarray[Any, Any] = quantize(rows.float().contiguous().numpy(), kind)
    return encoded.view(np.uint8)
