"""bitsandbytes 4-bit checkpoints: the one place that maps their key names to fourbit's and back.

bitsandbytes stores for a weight P (reference: `QuantState.as_dict(packed=True)`)
    P                                    codes, [n/2, 1], uint8 or the same bytes as another dtype
    P.absmax                             fp32 scales, or uint8 codes when nested (double-quantized)
    P.quant_map                          fp32 [16] codebook
    P.nested_absmax, P.nested_quant_map  fp32 second-level scales and fp32 [256] 8-bit map
    P.quant_state.bitsandbytes__nf4      uint8, UTF-8 JSON: quant_type, blocksize, dtype, shape, nested_*
fourbit holds the same bytes as flat uint8 parameters `weight`, `weight_absmax`, `weight_consts`
(nested_absmax, then offset, as bytes). Only shape, offset and types live in the JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.codebooks import codebook, dynamic_map
from fourbit.defaults import BLOCK_SIZES
from fourbit.errors import ModelError
from fourbit.limits import parse_json
from fourbit.model.formats.lazy import LazyTensor
from fourbit.nn.linear import Linear4bit
from fourbit.tensor import NESTED_BLOCK_SIZE, QuantizedTensor

_MARK = ".quant_state.bitsandbytes__"
#: bitsandbytes writes some 150 bytes. Its versions differ in the last bit of the maps.
_LONGEST_STATE, _MAP_ERROR = 1 << 16, 1e-6
_LARGEST_FLOAT = torch.finfo(torch.float32).max
#: Types of the scales, and those that bytes of codes may be stored as (bnb_4bit_quant_storage).
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_STORAGE = (*_FLOATS, torch.int8)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BnbScheme:
    """How every quantized weight of a checkpoint was quantized."""

    quant_type: str
    block_size: int
    double_quant: bool
    quantized: dict[str, tuple[int, ...]]  # module names, without ".weight", and the weights' shapes


def is_bnb_4bit(quantization_config: dict[str, Any] | None) -> bool:
    """Whether a config.json's quantization_config announces a bitsandbytes 4-bit checkpoint."""
    config = quantization_config or {}
    return config.get("quant_method") == "bitsandbytes" and bool(config.get("load_in_4bit"))


def convert_names(tensors: dict[str, LazyTensor], where: str) -> tuple[dict[str, LazyTensor], BnbScheme]:
    """Map a bitsandbytes checkpoint's entries to fourbit's, lazily, bytes unchanged.

    Raises ModelError when parts are missing or weights disagree in their scheme.
    """
    states: dict[str, str] = {}
    for key in tensors:
        weight, found, _ = key.partition(_MARK)
        if found and states.setdefault(weight, key) != key:
            raise ModelError(f"{where}: '{weight}' has two quant_states")
    if not states:
        raise ModelError(
            f"{where}: announces bitsandbytes 4-bit weights but holds no quant_state; is it complete?"
        )
    result = {
        k: t
        for k, t in tensors.items()
        if not any(k == w or k.startswith(w + ".") for w in (_owner(k),) if w in states)
    }
    schemes: dict[tuple[str, int, bool], str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, key in states.items():
        state = _parse_state(tensors[key], where, weight)
        nested = "nested_offset" in state
        schemes.setdefault((state["quant_type"], state["blocksize"], nested), weight)
        result |= _convert_one(tensors, weight, state, nested, where)
        shapes[weight.removesuffix(".weight")] = tuple(state["shape"])
    if len(schemes) > 1:
        (first, one), (second, other) = list(schemes.items())[:2]
        raise ModelError(
            f"{where}: '{one}' is {first} and '{other}' is {second}; mixed 4-bit schemes are not supported"
        )
    quant_type, block_size, nested = next(iter(schemes))
    return result, BnbScheme(quant_type, block_size, nested, shapes)


def check_places(scheme: BnbScheme, where: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError for a quantized weight that the model, whose `shapes` these are, does not have."""
    for module, shape in scheme.quantized.items():
        wanted = shapes.get(f"{module}.weight")
        if wanted is None:
            raise ModelError(f"{where}: 4-bit '{module}.weight' has no place in the model of the config")
        if wanted != shape or len(shape) != 2:
            raise ModelError(
                f"{where}: 4-bit '{module}.weight' has shape {list(shape)}, the config says {list(wanted)}"
            )


def restored(
    tensors: dict[str, LazyTensor], scheme: BnbScheme, shapes: dict[str, tuple[int, ...]], where: str
) -> dict[str, LazyTensor]:
    """What `convert_names` returned with every quantized weight as its fp32 values [out, in] instead.

    Raises ModelError for a weight that is not among the model's `shapes`.
    """
    check_places(scheme, where, shapes)
    packed = {
        f"{name}.{leaf}" for name in scheme.quantized for leaf in ("weight", "weight_absmax", "weight_consts")
    }
    result = {name: tensor for name, tensor in tensors.items() if name not in packed}
    for module in scheme.quantized:
        name = f"{module}.weight"

        def read(name: str = name) -> Tensor:
            rows, columns = shapes[name]
            layer = Linear4bit(
                columns,
                rows,
                bias=False,
                quant_type=scheme.quant_type,
                block_size=scheme.block_size,
                double_quant=scheme.double_quant,
                device="meta",
            )
            for leaf in ("weight", "weight_absmax", *(("weight_consts",) if scheme.double_quant else ())):
                stored = tensors[name.removesuffix("weight") + leaf].read()
                setattr(layer, leaf, nn.Parameter(stored, requires_grad=False))
            return layer.dequantize(torch.float32)

        result[name] = LazyTensor(read, torch.float32, shapes[name])
    return result


def to_bnb(prefix: str, q: QuantizedTensor) -> dict[str, Tensor]:
    """One quantized weight under bitsandbytes' names (`prefix` ends in `.weight`).

    Raises ModelError for what bitsandbytes cannot express, such as INT4.
    """
    if q.quant_type not in ("nf4", "fp4"):
        raise ModelError(
            f"'{prefix}' is {q.quant_type}, which a bitsandbytes checkpoint cannot hold; "
            "quantize with nf4 or fp4 to save"
        )
    state: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    parts = {
        prefix: q.codes.reshape(-1, 1),
        f"{prefix}.absmax": q.absmax,
        f"{prefix}.quant_map": codebook(q.quant_type),
    }
    if q.nested_absmax is not None and q.offset is not None:
        parts[f"{prefix}.nested_absmax"] = q.nested_absmax
        parts[f"{prefix}.nested_quant_map"] = dynamic_map()
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": q.offset.item(),
        }
    text = json.dumps(state).encode("utf-8")
    parts[f"{prefix}{_MARK}{q.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return {name: part.clone() if "quant_map" in name else part.contiguous() for name, part in parts.items()}


def bnb_config(
    quant_type: str, double_quant: bool, compute_dtype: torch.dtype, skipped: list[str]
) -> dict[str, Any]:
    """The `quantization_config` that makes transformers load the checkpoint with bitsandbytes."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skipped,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def _owner(key: str) -> str:
    """The weight a bitsandbytes key belongs to: `a.weight.absmax` and `a.weight` give `a.weight`."""
    head, found, _ = key.partition(".weight.")
    return f"{head}.weight" if found else key


def _convert_one(
    tensors: dict[str, LazyTensor], weight: str, state: dict[str, Any], nested: bool, where: str
) -> dict[str, LazyTensor]:
    def part(suffix: str) -> LazyTensor:
        try:
            return tensors[weight + suffix]
        except KeyError:
            raise ModelError(f"{where}: '{weight}{suffix}' is missing; is the checkpoint complete?") from None

    def check_length(suffix: str, count: int, *types: torch.dtype) -> None:
        stored = part(suffix)
        values = prod(stored.shape or ())
        if stored.dtype not in types or values != count:
            raise ModelError(
                f"{where}: '{weight}{suffix}' has {values} values of {stored.dtype}, its shape "
                f"{state['shape']} needs {count} of {types[0]}"
            )

    codes, absmax = part(""), part(".absmax")
    values, size = prod(state["shape"]), codes.dtype.itemsize
    blocks = -(-values // state["blocksize"])
    check_length("", -(-values // (2 * size)), torch.uint8, *_STORAGE)
    check_length(".absmax", blocks, *((torch.uint8,) if nested else _FLOATS))
    _check_map(
        tensors.get(f"{weight}.quant_map"), codebook(state["quant_type"]), where, f"{weight}.quant_map"
    )
    result = {
        weight: LazyTensor(lambda: codes.read().reshape(-1).view(torch.uint8), torch.uint8),
        f"{weight}_absmax": LazyTensor(lambda: _scales(absmax.read(), nested), torch.uint8),
    }
    if nested:
        second = part(".nested_absmax")
        if state.get("nested_blocksize") != NESTED_BLOCK_SIZE:
            raise ModelError(
                f"{where}: '{weight}' has nested blocks of {state.get('nested_blocksize')}, "
                f"not {NESTED_BLOCK_SIZE}"
            )
        _check_map(
            tensors.get(f"{weight}.nested_quant_map"), dynamic_map(), where, f"{weight}.nested_quant_map"
        )
        check_length(".nested_absmax", -(-blocks // NESTED_BLOCK_SIZE), *_FLOATS)
        offset = torch.tensor([float(state["nested_offset"])], dtype=torch.float32)
        result[f"{weight}_consts"] = LazyTensor(
            lambda: torch.cat([second.read().to(torch.float32).reshape(-1), offset]).view(torch.uint8),
            torch.uint8,
        )
    return result


def _scales(absmax: Tensor, nested: bool) -> Tensor:
    flat = absmax.reshape(-1).contiguous()
    return flat if nested else flat.to(torch.float32).view(torch.uint8)


def _parse_state(stored: LazyTensor, where: str, weight: str) -> dict[str, Any]:
    try:
        if stored.dtype != torch.uint8 or prod(stored.shape or ()) > _LONGEST_STATE:
            raise ValueError(f"{list(stored.shape or ())} of {stored.dtype} is no text of its length")
        state = dict(parse_json(bytes(stored.read().tolist())))
        block_size = state["blocksize"]
        if state["quant_type"] not in ("nf4", "fp4") or str(block_size) not in map(str, BLOCK_SIZES):
            raise ValueError("unknown quant_type or blocksize")
        if state["dtype"] not in _DTYPES or not all(isinstance(n, int) and n > 0 for n in state["shape"]):
            raise ValueError("unknown dtype or shape")
        if "nested_offset" in state and not abs(float(state["nested_offset"])) <= _LARGEST_FLOAT:
            raise ValueError("nested_offset is no fp32 number")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"{where}: the quant_state of '{weight}' is malformed ({error})") from None
    return state


def _check_map(stored: LazyTensor | None, expected: Tensor, where: str, name: str) -> None:
    """Raise ModelError for codes that stand for other values than those of their type."""
    if stored is None:
        return
    same = stored.shape == tuple(expected.shape)
    if not same or not torch.allclose(stored.read().to(torch.float32), expected, rtol=0, atol=_MAP_ERROR):
        raise ModelError(f"{where}: '{name}' is not the map of its type; such codes cannot be read")
