"""Training steps of large Llama shapes whose weights stay on the disk, under a limit of memory.

    python benchmarks/big_model.py 7b --limit 3GB
    python benchmarks/big_model.py 65b --limit 8GB --folder /large/disk

Writes a 4-bit checkpoint of the shape with random packed weights (7b: 4 GB, 65b: 35 GB), empties the system's
file cache where that is allowed, and runs `fourbit train --memory LIMIT` on 256 random tokens (r = 16, all
linear layers), in a control group with that limit where one can be made (Linux, as root), so that a byte more
ends the process. Prints the plan's choice, the predicted and the measured peak, and each step's time: how
long the disk was read, and how long computing waited for it. The checkpoint is kept only under --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from limited import run_limited, say

#: Paper's models: hidden size, feed-forward, layers, heads; all with 32,000 words.
SHAPES = {
    "160m": (768, 2048, 12, 12),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "33b": (6656, 17920, 60, 52),
    "65b": (8192, 22016, 80, 64),
}
WORDS, TOKENS = 32_000, 256


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--limit", default="3GB", help="memory, also of the control group (default 3GB)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written, and found again")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="for fourbit train"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fourbit-big-") as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.shape
        if not (folder / "model.safetensors.index.json").exists():
            say("writing the checkpoint")
            write_checkpoint(folder, *SHAPES[arguments.shape])
        emptied = drop_file_cache()
        say(f"file cache {'emptied' if emptied else 'as it is: it can be emptied only as root'}")
        result = train(folder, Path(temporary), arguments)
    print(json.dumps(result) if arguments.json else table(arguments.shape, result))
    return 0


def write_checkpoint(folder: Path, hidden: int, inner: int, layers: int, heads: int) -> None:
    """A Llama of this shape, one file a layer; codes and scales are random and of a usual size."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from fourbit.codebooks import codebook
    from fourbit.model.formats.bnb import bnb_config, to_bnb
    from fourbit.tensor import NESTED_BLOCK_SIZE, QuantizedTensor

    generator = torch.Generator().manual_seed(0)

    def packed(rows: int, columns: int) -> QuantizedTensor:
        blocks = rows * columns // 64
        nested = -(-blocks // NESTED_BLOCK_SIZE)
        codes, absmax = (
            torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
            for count in (rows * columns // 2, blocks)
        )
        return QuantizedTensor(
            codes=codes,
            absmax=absmax,
            shape=(rows, columns),
            dtype=torch.bfloat16,
            quant_type="nf4",
            block_size=64,
            codebook=codebook("nf4"),
            nested_absmax=torch.full((nested,), 0.5 / hidden**0.5),
            offset=torch.tensor(1.0 / hidden**0.5),
        )

    def matrix(rows: int) -> torch.Tensor:
        return torch.randn(rows, hidden, generator=generator, dtype=torch.bfloat16) * 0.02

    norm = torch.ones(hidden, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    write(
        "model-rest.safetensors",
        {
            "model.embed_tokens.weight": matrix(WORDS),
            "lm_head.weight": matrix(WORDS),
            "model.norm.weight": norm,
        },
    )
    for number in range(layers):
        layer = f"model.layers.{number}"
        tensors = {
            f"{layer}.input_layernorm.weight": norm.clone(),
            f"{layer}.post_attention_layernorm.weight": norm.clone(),
        }
        for name in ("q", "k", "v", "o"):
            tensors |= to_bnb(f"{layer}.self_attn.{name}_proj.weight", packed(hidden, hidden))
        for name in ("gate", "up"):
            tensors |= to_bnb(f"{layer}.mlp.{name}_proj.weight", packed(inner, hidden))
        tensors |= to_bnb(f"{layer}.mlp.down_proj.weight", packed(hidden, inner))
        write(f"model-layer-{number:02}.safetensors", tensors)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
    ).to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    config["quantization_config"] = bnb_config("nf4", True, torch.bfloat16, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    """Whole numbers as words, so that a row of any length can be written."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{str(number): number for number in range(3, WORDS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(str(folder))


def drop_file_cache() -> bool:
    """Whether what the system keeps of files could be dropped, so that reading reads the disk."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    return False


def train(folder: Path, temporary: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """`fourbit train` in a process of its own under the limit; its figures."""
    import random

    from fourbit.memory.sizes import parse_size

    numbers = random.Random(0)
    rows = temporary / "rows.jsonl"
    with rows.open("w") as file:
        for _ in range(arguments.steps):
            # The end of the text is a token too.
            text = " ".join(str(numbers.randrange(3, WORDS)) for _ in range(TOKENS - 1))
            file.write(json.dumps({"text": text}) + "\n")
    limit, run = parse_size(arguments.limit), temporary / "run"
    settings = {
        "lora.r": 16,
        "data.max_length": TOKENS,
        "data.heldout_fraction": 0,
        "data.loss": "all",
        "train.effective_batch": 1,
        "train.max_steps": arguments.steps,
        "train.eval_every": arguments.steps,
        "output": run,
    }
    overrides = [f"--set={key}={value}" for key, value in settings.items()]
    overrides += [f"--set={override}" for override in arguments.overrides]
    # What is left to the group is the system's: page tables and what it caches of files.
    memory = f"{limit * 95 // 100 // 10**6}MB"
    command = ["train", "--model", str(folder), "--data", str(rows), "--memory", memory, *overrides]
    group = run_limited(limit, command)
    summary = json.loads((run / "summary.json").read_text())
    times = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    return {
        "limit": limit,
        "enforced": group.enforced,
        "group_peak": group.peak,
        "predicted": summary["predicted_peak_bytes"],
        "measured": summary["peak_bytes"],
        "choice": summary["plan"]["choice"],
        "step_seconds": [line["seconds"] for line in times if "seconds" in line],
        "read_bytes": summary.get("weights_read_bytes", 0),
        "reading_seconds": summary.get("weights_reading_seconds", 0.0),
        "waiting_seconds": summary.get("weights_waiting_seconds", 0.0),
    }


def table(shape: str, result: dict[str, Any]) -> str:
    seconds = result["step_seconds"]
    enforced = "enforced by a control group" if result["enforced"] else "not enforced"
    return "\n".join(
        [
            f"{shape}, 1 x {TOKENS} tokens, r = 16, all linear layers",
            f"limit      {result['limit'] / 1e9:.2f} GB, {enforced}",
            f"peak       {result['measured'] / 1e9:.2f} GB resident, "
            f"predicted {result['predicted'] / 1e9:.2f} GB",
            f"steps      {', '.join(f'{value:.1f} s' for value in seconds)}",
            f"read       {result['read_bytes'] / 1e9:.1f} GB in {result['reading_seconds']:.1f} s, of which "
            f"computing waited {result['waiting_seconds']:.1f} s",
            f"choice     {json.dumps(result['choice'])}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
