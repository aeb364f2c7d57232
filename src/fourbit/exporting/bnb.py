"""Quantizing a streamed model into a 4-bit checkpoint, and what that costs.

It is bitsandbytes', but for a mixture whose experts are to be packed: those have no place there, and are
written under quant_method "fourbit" (`model.formats.own`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.exporting import provenance
from fourbit.exporting.card import model_card
from fourbit.exporting.folder import check_output, written_aside
from fourbit.exporting.hf import write_companions, write_config
from fourbit.exporting.shards import SHARD_BYTES, ShardWriter
from fourbit.exporting.streamed import Progress, Streamed, file_tensors
from fourbit.functional import dequantize_4bit, quantize_4bit
from fourbit.model.base import quantized_weights, transposed_weights
from fourbit.model.formats.bnb import bnb_config, to_bnb
from fourbit.model.formats.lazy import LazyStack, LazyTensor
from fourbit.model.formats.own import own_config
from fourbit.model.quantizer import linear_names
from fourbit.model.save import check_savable
from fourbit.nn.matrix import packed_bytes
from fourbit.tensor import QuantizedTensor

#: bitsandbytes stores for one weight at most: codes, absmax, map, two of the nested scales, state.
_SUFFIXES = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
)
_OWN_SUFFIXES = ("", "_absmax", "_consts")


@dataclass(frozen=True)
class Requantized:
    """What a 4-bit export weighs and what it lost.

    weight_error  relative RMS error of each quantized weight: |restored - given| / |given|
    own           the format is fourbit's own, for packed experts
    """

    bytes: int
    bits_per_weight: float
    weight_error: dict[str, float]
    own: bool = False

    @property
    def mean_error(self) -> float:
        """Over the quantized weights."""
        return sum(self.weight_error.values()) / len(self.weight_error)

    @property
    def worst(self) -> tuple[str, float]:
        """The weight that lost most."""
        return max(self.weight_error.items(), key=lambda entry: entry[1])

    def effect(self) -> dict[str, Any]:
        """For a record."""
        name, error = self.worst
        return {
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "mean_weight_error": self.mean_error,
            "largest_weight_error": error,
            "largest_weight_error_in": name,
        }


def write_bnb(
    model: Streamed,
    folder: str | os.PathLike[str],
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    datasets: Sequence[str] = (),
    experts: bool = False,
    kind: str = "export",
    sources: Sequence[provenance.Source] = (),
    progress: Progress | None = None,
) -> Requantized:
    """Quantize the linear layers of a model and write it for bitsandbytes, tensor by tensor.

    model    best streamed unrounded (dtype None), so that a weight is rounded once
    dtype    of embeddings, norms and the head
    experts  quantize those of a mixture too, which only fourbit reads; else they stay in 16 bits
    kind     of step in the record; sources: what it took beside what the model was made from

    Raises ModelError for a type that bitsandbytes lacks, QuantizationError for weights that are not
    finite, and as `write_hf` does.
    """
    check_savable(quant_type)
    target = Path(folder)
    check_output(target, overwrite, [model.base.path])
    skeleton = model.base.skeleton
    names, stored_so = quantized_weights(skeleton), transposed_weights(skeleton)
    stacks = {name for name, tensor in model.tensors.items() if isinstance(tensor, LazyStack)}
    own = experts and bool(stacks & names)
    if not own:
        names -= stacks
    tensors = model.tensors if own else file_tensors(model)
    form = "fourbit" if own else "bnb"
    errors: dict[str, float] = {}
    code_bytes = weights = 0
    with written_aside(target) as partial:
        suffixes = _OWN_SUFFIXES if own else _SUFFIXES
        expected = [n + s for n in tensors for s in (suffixes if n in names else ("",))]
        writer = ShardWriter(partial, expected, shard_bytes)
        try:
            for number, (name, tensor) in enumerate(tensors.items(), start=1):
                if name in names:
                    packed, change, size = [], 0.0, 0.0
                    for matrix in _matrices(tensor, name in stored_so):
                        q = quantize_4bit(matrix, quant_type, block_size, double_quant, name=name)
                        packed.append(q)
                        change += _squared(dequantize_4bit(q, torch.float32).sub_(matrix))
                        size += _squared(matrix)
                        code_bytes, weights = code_bytes + q.nbytes, weights + q.numel
                    errors[name] = sqrt(change / max(size, 1e-60))
                    parts = _own(name, packed, name in stacks) if own else to_bnb(name, packed[0])
                    for key, part in parts.items():
                        writer.add(key, part)
                else:
                    value = tensor.read()
                    writer.add(name, value.to(dtype) if value.is_floating_point() else value)
                if progress is not None:
                    progress("quantize and write weights", number, len(tensors))
            written = writer.finish()
        finally:
            writer.abandon()
        result = Requantized(written, 8 * code_bytes / max(1, weights), errors, own)
        skipped = [n for n in linear_names(skeleton, []) if f"{n}.weight" not in names]
        if own:
            scheme = own_config(quant_type, block_size, double_quant, skipped)
        else:
            scheme = bnb_config(quant_type, double_quant, dtype, skipped)
        write_config(model.config, partial, dtype, quantization_config=scheme)
        write_companions(model.base, partial)
        settings = {
            "to": form,
            "quant_type": quant_type,
            "block_size": block_size,
            "double_quant": double_quant,
        }
        step = provenance.make_step(kind, list(sources), settings, result.effect())
        chain = (*model.chain, step)
        provenance.write(partial, chain)
        (partial / "README.md").write_text(
            model_card(model, target.name, form, chain, datasets), encoding="utf-8"
        )
    return result


def _matrices(tensor: LazyTensor, transposed: bool) -> Iterator[Tensor]:
    """The matrices [out, in] of a weight, read one by one."""
    if isinstance(tensor, LazyStack):
        assert tensor.shape is not None
        yield from map(tensor.matrix, range(tensor.shape[0]))
    else:
        yield tensor.read().t().contiguous() if transposed else tensor.read()


def _own(name: str, packed: list[QuantizedTensor], stack: bool) -> dict[str, Tensor]:
    """The matrices of one weight as fourbit's own format has them."""
    parts = [packed_bytes(q) for q in packed]
    return {
        name + ending: torch.stack([part[ending] for part in parts]) if stack else parts[0][ending]
        for ending in parts[0]
    }


def _squared(values: Tensor) -> float:
    return float(values.to(torch.float32).norm()) ** 2
