"""Writing safetensors files as tensors come, without holding a file in memory.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and position
of every tensor, padded with blanks), and the values without a gap. The library's own writer wants all
tensors of a file at once; here room is left for the header, and it is written last. A tensor whose size
is no multiple of eight bytes waits until its file is full, so that all values stand aligned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

SHARD_BYTES = 4_000_000_000
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
#: More than the header says of one tensor beside its name: dtype, up to four sizes, two positions.
_ENTRY_BYTES = 180


class ShardWriter:
    """Writes tensors into model-00001-of-0000N.safetensors files and an index, or into model.safetensors.

    names  of all tensors that will come (room for the header is reckoned from them)
    """

    def __init__(self, folder: Path, names: Iterable[str], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._room = 1024 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._room += -self._room % 8
        self._files: list[list[str]] = []
        self._total = 0
        self._open: _Shard | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; a new file begins where it would overfill the current one."""
        if self._open is not None and self._open.size and self._open.size + tensor.nbytes > self._shard_bytes:
            self._close()
        if self._open is None:
            self._open = _Shard(self._temporary(len(self._files)), self._room)
        self._open.add(name, tensor)
        self._total += tensor.nbytes

    def finish(self) -> int:
        """Complete the files and the index; returns the bytes of all tensors."""
        self._close()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            self._temporary(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            path = self._folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return self._total

    def abandon(self) -> None:
        """Close what is open, after a failure."""
        if self._open is not None:
            self._open.file.close()

    def _temporary(self, number: int) -> Path:
        return self._folder / f"shard-{number}"

    def _close(self) -> None:
        if self._open is not None:
            self._files.append(self._open.finish())
            self._open = None


class _Shard:
    """One file that is being written."""

    def __init__(self, path: Path, room: int) -> None:
        self.file: IO[bytes] = path.open("wb")
        self.size = 0
        self._room, self._position = room, 0
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._waiting: list[tuple[str, Tensor]] = []
        self.file.seek(8 + room)

    def add(self, name: str, tensor: Tensor) -> None:
        self.size += tensor.nbytes
        if tensor.nbytes % 8:
            self._waiting.append((name, tensor.clone()))
        else:
            self._write(name, tensor)

    def finish(self) -> list[str]:
        for name, tensor in sorted(self._waiting, key=lambda entry: -entry[1].itemsize):
            self._write(name, tensor)
        header = json.dumps(self._header, separators=(",", ":")).encode("utf-8")
        assert len(header) <= self._room
        self.file.seek(0)
        self.file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self.file.close()
        return [name for name in self._header if name != "__metadata__"]

    def _write(self, name: str, tensor: Tensor) -> None:
        values = tensor.detach().cpu().contiguous().reshape(-1)
        self._header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._position, self._position + tensor.nbytes],
        }
        self._position += tensor.nbytes
        self.file.write(values.view(torch.uint8).numpy().data)
