"""Quantizing a streamed model again, into a bitsandbytes 4-bit checkpoint, and what that costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.exporting import provenance
from fourbit.exporting.card import model_card
from fourbit.exporting.folder import check_output, written_aside
from fourbit.exporting.hf import write_companions, write_config
from fourbit.exporting.shards import SHARD_BYTES, ShardWriter
from fourbit.exporting.streamed import Progress, Streamed
from fourbit.functional import dequantize_4bit, quantize_4bit
from fourbit.model.base import quantized_weights, transposed_weights
from fourbit.model.formats.bnb import bnb_config, to_bnb
from fourbit.model.quantizer import linear_names
from fourbit.model.save import check_savable

#: bitsandbytes stores for one weight at most: codes, absmax, map, two of the nested scales, state.
_SUFFIXES = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
)


@dataclass(frozen=True)
class Requantized:
    """What a 4-bit export weighs and what it lost.

    weight_error  relative RMS error of each quantized weight: |restored - given| / |given|
    """

    bytes: int
    bits_per_weight: float
    weight_error: dict[str, float]

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
    kind: str = "export",
    sources: Sequence[provenance.Source] = (),
    progress: Progress | None = None,
) -> Requantized:
    """Quantize the linear layers of a model and write it for bitsandbytes, tensor by tensor.

    model  best streamed unrounded (dtype None), so that a weight is rounded once
    dtype  of embeddings, norms and the head
    kind   of step in the record, and what it took beside what the model was made from

    Raises ModelError for a type that bitsandbytes lacks, QuantizationError for weights that are not
    finite, and as `write_hf` does.
    """
    check_savable(quant_type)
    target = Path(folder)
    check_output(target, overwrite, [model.base.path])
    names = quantized_weights(model.base.skeleton)
    stored_so = transposed_weights(model.base.skeleton)
    errors: dict[str, float] = {}
    packed_bytes = weights = 0
    with written_aside(target) as partial:
        expected = [n + s for n in model.tensors for s in (_SUFFIXES if n in names else ("",))]
        writer = ShardWriter(partial, expected, shard_bytes)
        try:
            for number, (name, tensor) in enumerate(model.tensors.items(), start=1):
                value = tensor.read()
                if name in names:
                    value = value.t().contiguous() if name in stored_so else value
                    q = quantize_4bit(value, quant_type, block_size, double_quant, name=name)
                    errors[name] = _relative_error(dequantize_4bit(q, torch.float32), value)
                    packed_bytes, weights = packed_bytes + q.nbytes, weights + q.numel
                    for key, part in to_bnb(name, q).items():
                        writer.add(key, part)
                else:
                    writer.add(name, value.to(dtype) if value.is_floating_point() else value)
                if progress is not None:
                    progress("quantize and write weights", number, len(model.tensors))
            size = writer.finish()
        finally:
            writer.abandon()
        result = Requantized(size, 8 * packed_bytes / max(1, weights), errors)
        skipped = [n for n in linear_names(model.base.skeleton, []) if f"{n}.weight" not in names]
        scheme = bnb_config(quant_type, double_quant, dtype, skipped)
        write_config(model.config, partial, dtype, quantization_config=scheme)
        write_companions(model.base, partial)
        settings = {
            "to": "bnb",
            "quant_type": quant_type,
            "block_size": block_size,
            "double_quant": double_quant,
        }
        step = provenance.make_step(kind, list(sources), settings, result.effect())
        chain = (*model.chain, step)
        provenance.write(partial, chain)
        (partial / "README.md").write_text(
            model_card(model, target.name, "bnb", chain, datasets), encoding="utf-8"
        )
    return result


def _relative_error(restored: Tensor, given: Tensor) -> float:
    given = given.to(torch.float32)
    return float((restored.sub_(given).norm() / given.norm().clamp_min(1e-30)).item())
