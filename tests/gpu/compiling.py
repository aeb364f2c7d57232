"""Compile every kernel for a card that need not be here: `python -m tests.gpu.compiling CAPABILITY DTYPE`.

Prints a JSON object: for each kernel how many fused multiply-adds, approximate divisions and roots, and
instructions of tensor cores its code has, and the bytes of shared memory that it takes.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fourbit.kernels.gpu import codec, dropout, loss, optimizer, product

SCALES = {"nested": "*fp32", "offset": "*fp32", "dynamic": "*fp32", "codebook": "*fp32"}
TABLES = {"table": "*i64", "numbers": "*fp32", "segment": "*i32", "chunk": "*i32"}
MAPS = {f"{sign}_{what}": "*fp32" for sign in ("signed", "unsigned") for what in ("map", "thresholds")}


def kernels(dtype: str) -> dict[str, tuple[Any, dict[str, str], dict[str, Any], bool]]:
    """By name: the kernel, the types of its arguments, its constants, and whether it may fuse."""
    ours = f"*{dtype}"
    found = {
        "quantize": (
            codec._quantize,
            {"w": ours, "thresholds": "*fp32", "order": "*u8", "codes": "*u8", "absmax": "*fp32", "n": "i32"},
            {"BLOCK": 64, "BLOCKS": 32},
            False,
        ),
        "dropout": (
            dropout._dropout,
            {
                "x": ours, "rows": "*i64", "positions": "*i64", "y": ours, "tokens": "i32", "columns": "i32",
                "key": "i64", "layer": "i64", "dropped": "i32", "factor": "fp32",
            },
            {"TOKENS": 2, "GROUPS": 128},
            False,
        ),
        "loss": (
            loss._cross_entropy,
            {
                "logits": ours, "labels": "*i64", "loss": "*fp32", "words": "i32", "scale": "fp32",
                "softcap": "fp32",
            },
            {"CAP": True, "GRADIENT": True, "WORDS": 4096},
            True,
        ),
        "adamw": (optimizer._adamw, TABLES, {"COLUMNS": 5, "NUMBERS": 8, "CHUNK": 1024}, False),
        "adamw_8bit": (
            optimizer._adamw_8bit,
            {**TABLES, **MAPS},
            {"COLUMNS": 7, "NUMBERS": 8, "BLOCK": 256, "BLOCKS": 4},
            False,
        ),
    }  # fmt: skip
    for double in (False, True):
        scales = {"codes": "*u8", "absmax": "*u8" if double else "*fp32", **SCALES}
        found[f"dequantize{'_double' * double}"] = (
            codec._dequantize,
            {**scales, "out": ours, "n": "i32"},
            {"BLOCK": 64, "DOUBLE": double, "BYTES": 1024},
            False,
        )
    product_types = {
        "x": ours, "codes": "*u8", "absmax": "*u8", **SCALES, "bias": ours, "y": ours,
        "rows": "i32", "features": "i32", "width": "i32",
    }  # fmt: skip
    constants = {"BLOCK": 64, "DOUBLE": True, "BIAS": True}
    if dtype != "fp32":
        found["many"] = (product._many, product_types, {**constants, **product.MANY}, False)
    for one in (True, False):
        sizes = {"ROWS": 16, "FEATURES": product._FEATURES_ONE, "BYTES": product._BYTES_ONE}
        if not one:
            sizes |= {"FEATURES": product._FEATURES, "BYTES": product._BYTES}
        found["row" if one else "rows"] = (
            product._product,
            product_types,
            {**constants, "ONE": one, **sizes},
            False,
        )
    return found


def compiled(capability: int, dtype: str) -> dict[str, dict[str, int]]:
    counts = {}
    for name, (kernel, types, constants, fuses) in kernels(dtype).items():
        names = kernel.arg_names
        assert {*types, *constants} == {*names}, name
        source = ASTSource(
            kernel,
            {argument: types.get(argument, "constexpr") for argument in names},
            {(names.index(argument),): value for argument, value in constants.items()},
        )
        target = GPUTarget("cuda", capability, 32)
        result = compile(source, target=target, options={"enable_fp_fusion": fuses})
        code = result.asm["ptx"]
        counts[name] = {
            "fused": len(re.findall(r"\bfma\.", code)),
            "approximate": len(re.findall(r"\b(?:div|sqrt|rcp)\.(?:approx|full)", code)),
            "tensor_cores": len(re.findall(r"\b(?:mma|wgmma)\.", code)),
            "shared": int(result.metadata.shared),
        }
    return counts


if __name__ == "__main__":
    print(json.dumps(compiled(int(sys.argv[1]), sys.argv[2])))
