"""GPTQ and AWQ by llm-compressor, in a Python that has it: `python llmcompressor_worker.py REQUEST.json`.

REQUEST.json
    folder       model to read: safetensors at 16 or 32 bits
    output       folder to write, in compressed-tensors format
    method       "gptq" (symmetric, columns in order of activation) or "awq" (asymmetric, with zero points)
    group_size   weights of a row that share a scale
    ignore       names of linear layers to leave as they are
    calibration  lists of token ids

Standard output carries one JSON object a line: {"done", "total"} in calls of decoder layers, at the end
{"layers", "versions"}, or {"error"} with exit code 1. All else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any, TextIO

#: A layer runs on every row twice: to calibrate it, and to give the next layer the quantized one's output.
PASSES = 2


def main(request: dict[str, Any], out: TextIO) -> None:
    """Quantize as requested, reporting on `out`."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    # dtype "auto": the stored one, so that what is not quantized is written as it was read.
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype="auto", local_files_only=True)
    model.eval()
    rows: Any = [_inputs(torch, ids) for ids in request["calibration"]]
    _report_layers(model, len(rows), out)
    if not torch.accelerator.is_available():
        _never_pin_memory()
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),
        recipe=_recipe(request["method"], request["group_size"], request["ignore"]),
        pipeline="sequential",
        num_calibration_samples=len(rows),
    )
    layers = sum(getattr(module, "quantization_scheme", None) is not None for module in model.modules())
    model.save_pretrained(request["output"], save_compressed=True)
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    _say(out, {"layers": layers, "versions": {name: version(name) for name in packages}})


def _inputs(torch: Any, ids: list[int]) -> dict[str, Any]:
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _recipe(method: str, group_size: int, ignore: list[str]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": method == "gptq",
        "strategy": "group",
        "group_size": group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=ignore)]
    # AWQ moves the weights' scales; the plain rounding after it writes the 4 bits.
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=ignore)]


def _never_pin_memory() -> None:
    """AWQ pins what it reads repeatedly, to copy it to a GPU faster; without a GPU torch refuses to pin
    (llm-compressor 0.14.0.1, since its pull request 2813).
    """
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_: None


def _report_layers(model: Any, rows: int, out: TextIO) -> None:
    """Report every hundredth part of the decoder layers' calls."""
    layers = [
        module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())
    ]
    total, done = len(layers) * rows * PASSES, 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done * 100 // total > (done - 1) * 100 // total:
            _say(out, {"done": done, "total": total})

    for layer in layers:
        layer.register_forward_hook(count)


def _say(out: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=out, flush=True)


if __name__ == "__main__":
    # llm-compressor logs to standard output, which is the protocol's: keep that for ourselves.
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        with open(sys.argv[1], encoding="utf-8") as file:
            main(json.load(file), protocol)
    except Exception as error:
        _say(protocol, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        raise
