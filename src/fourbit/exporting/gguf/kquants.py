"""K-quants, which mix block types by what each tensor weighs: made by llama.cpp, through cyllama.

The gguf package reads these types but cannot write them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourbit.errors import ModelError
from fourbit.exporting.gguf import types


def require() -> Any:
    """The binding; raises ModelError with the command that installs it."""
    try:
        from cyllama.llama import llama_cpp
    except ImportError as error:
        raise ModelError(
            f"K-quants are made by llama.cpp through cyllama, which cannot be imported ({error}); "
            "pip install 'fourbit[gguf-k]', or choose Q8_0 or Q4_0"
        ) from error
    return llama_cpp


def quantize(source: Path, target: Path, quant: str, threads: int = 0) -> None:
    """Quantize a 16- or 32-bit GGUF file to a K-quant. threads: 0 for as many as there are cores.

    Rows that the mix's blocks of 256 do not fit get llama.cpp's fallback, 32-value blocks of more bits.
    """
    llama_cpp = require()
    llama_cpp.disable_logging()
    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype = int(types.file_type(quant))
    settings.nthread = threads
    try:
        llama_cpp.model_quantize(str(source), str(target), settings)
    except RuntimeError as error:
        raise ModelError(f"{source}: llama.cpp cannot quantize it to {quant} ({error})") from error
