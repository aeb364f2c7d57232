"""Hugging Face folders: safetensors files, one or sharded, opened but not read.

Pickled weights (`pytorch_model.bin`) are never loaded: unpickling runs code.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourbit.errors import ModelError
from fourbit.limits import parse_json
from fourbit.memory.mapped import MappedFile
from fourbit.model.formats.lazy import LazyTensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

#: Bytes up to which a tensor is copied: a mapping holds up to half a megabyte of pages beside it.
_SMALL = 1 << 20


def open_folder(folder: Path, mapped: list[MappedFile] | None = None) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint folder by name, unread.

    mapped  4-bit codes and their scales are not read but mapped, and the files that hold them added here

    Raises ModelError naming the file that is missing, truncated, or pickled.
    """
    tensors: dict[str, LazyTensor] = {}
    for file in _weight_files(folder):
        tensors.update(_open_file(file, mapped))
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
            files = [folder / name for name in names]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{index}: not a valid index of weight files; download it again") from None
        for name in names:
            # Of the name alone: the file may be a link, as those in the hub's cache are.
            if name != Path(name).name or name in ("", ".", ".."):
                raise ModelError(f"{index}: names a file outside the model folder ({name})")
        return files
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder}: holds pickled weights (.bin), which can run code and are never loaded; "
            "convert them to safetensors first"
        )
    raise ModelError(
        f"{folder}: no model.safetensors here; give a folder with safetensors weights, or a .gguf file"
    )


def _open_file(file: Path, mapped: list[MappedFile] | None) -> dict[str, LazyTensor]:
    try:
        handle = safe_open(str(file), framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{file}: missing, though the index names it; download it again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from None

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            # Opened anew: the pages that a read maps stay resident as long as its handle or its tensor.
            try:
                with safe_open(str(file), framework="pt") as own:
                    tensor = own.get_tensor(name)
                    return tensor.clone() if tensor.nbytes <= _SMALL else tensor
            except (SafetensorError, OSError, ValueError) as error:
                raise _damaged(file, error) from None

        return read

    in_place = _mapped_tensors(file, mapped) if mapped is not None else {}
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 - safe_open is not a mapping
        entry = handle.get_slice(name)
        stored = entry.get_dtype()
        if stored not in _DTYPES:
            raise ModelError(f"{file}: tensor '{name}' has dtype {stored}, which cannot be read")
        tensors[name] = LazyTensor(
            in_place.get(name) or reader(name), _DTYPES[stored], tuple(entry.get_shape())
        )
    return tensors


def _mapped_tensors(file: Path, mapped: list[MappedFile]) -> dict[str, Callable[[], Tensor]]:
    """How to have codes and scales where they lie in the file, flat; safetensors has checked the file."""
    whole = MappedFile(file)
    mapped.append(whole)
    (length,) = struct.unpack("<Q", bytes(whole.tensor(0, 8).tolist()))
    start = 8 + length
    header = parse_json(bytes(whole.tensor(8, start).numpy()))

    def taker(begin: int, end: int, dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: whole.tensor(begin, end).view(dtype)

    found = {}
    for name, entry in header.items():
        if not any(name.endswith(f"{mark}absmax") or f"{name}{mark}absmax" in header for mark in "._"):
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is not None and begin % dtype.itemsize == 0:
            found[name] = taker(begin, end, dtype)
    return found


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file}: truncated or damaged ({error}); download it again")
