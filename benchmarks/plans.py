"""What `fourbit plan` says of well-known shapes: the paper's runs, and what fits on which card.

    python benchmarks/plans.py            the tables of docs/memory.md; nothing is trained, some minutes

The first table is a run of QLoRA's appendix (LLaMA, r = 64 on all linear layers, batch 1 of 512 tokens, every
token labelled, activation checkpointing, 32-bit AdamW) beside the memory that the paper reports for it. The
second has for each card the longest row that can be trained with r = 16 and the leanest choice: one row at a
time, checkpointing, optimizer states in host memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from fourbit.config_file import resolve
from fourbit.memory.plan import Choice, Plan
from fourbit.training.planner import Planner
from fourbit.training.target import Rows, Target

#: Kind, then hidden size, feed-forward, layers, heads, KV heads, words.
SHAPES = {
    "LLaMA 7B": ("llama", 4096, 11008, 32, 32, 32, 32000),
    "LLaMA 13B": ("llama", 5120, 13824, 40, 40, 40, 32000),
    "LLaMA 33B": ("llama", 6656, 17920, 60, 52, 52, 32000),
    "LLaMA 65B": ("llama", 8192, 22016, 80, 64, 64, 32000),
    "Llama 3 8B": ("llama", 4096, 14336, 32, 32, 8, 128256),
    "Qwen 2.5 14B": ("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "Qwen 2.5 32B": ("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "Llama 3 70B": ("llama", 8192, 28672, 80, 64, 8, 128256),
}
#: QLoRA's appendix, a figure: MB of model, optimizer and adapters, GB in all.
PAPER = {
    "LLaMA 7B": (5046, 1152, 298, 6.9),
    "LLaMA 13B": (8476, 1800, 450, 11.3),
    "LLaMA 33B": (19302, 3510, 897.5, 24.7),
    "LLaMA 65B": (37074, 5760, 1440, 45.0),
}
CARDS = {
    "8 GB": "rtx-4060",
    "12 GB": "rtx-3060",
    "16 GB": "rtx-4080",
    "24 GB": "rtx-4090",
    "48 GB": "l40s",
    "80 GB": "h100",
}
LONGEST, STEP = 131_072, 256


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="fourbit-plans-") as folder:
        paper(Path(folder))
        fits(Path(folder))
    return 0


def paper(folder: Path) -> None:
    print("| | paper: model, optimizer, adapters, in all | fourbit: weights, optimizer, adapters, in all |")
    print("|---|---|---|")
    for name, (model, optimizer, adapters, total) in PAPER.items():
        plan = planner(folder, name, 64, "h100").plan(Choice(1, True, 24))
        parts = {part.name: part.size / 1e6 for part in plan.held}
        weights = parts["packed weights"] + parts["scales"] + parts["weights in bfloat16"]
        print(
            f"| {name} | {model:,} + {optimizer:,} + {adapters:,} MB, {total} GB | {weights:,.0f} + "
            f"{parts['optimizer states']:,.0f} + {parts['adapters']:,.0f} MB, {plan.peak / 1e9:.1f} GB |"
        )


def fits(folder: Path) -> None:
    print(f"\n| | {' | '.join(CARDS)} |\n|---|{'---|' * len(CARDS)}")
    for name in SHAPES:
        cells = []
        for card in CARDS.values():
            plans = planner(folder, name, 16, card)
            cells.append(longest(plans))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def longest(plans: Planner) -> str:
    """The longest row that fits, to 256 tokens."""

    def plan(tokens: int) -> Plan:
        plans.use_rows(Rows(tokens))
        return plans.plan(Choice(1, True, 6, 0))

    low, high = 0, LONGEST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if plan(middle * STEP).fits:
            low = middle
        else:
            high = middle - 1
    return f"{low * STEP:,}" if low else "-"


def planner(folder: Path, name: str, r: int, card: str) -> Planner:
    kind, hidden, inner, layers, heads, kv_heads, words = SHAPES[name]
    place = folder / name
    place.mkdir(exist_ok=True)
    config = {
        "model_type": kind,
        "architectures": ["Qwen2ForCausalLM" if kind == "qwen2" else "LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "max_position_embeddings": LONGEST,
        "tie_word_embeddings": False,
    }
    (place / "config.json").write_text(json.dumps(config))
    settings = resolve({"model": {"path": str(place)}, "lora": {"r": r}, "data": {"train": "rows.jsonl"}})
    return Planner(settings, Target.of(settings, card), Rows(512))


if __name__ == "__main__":
    sys.exit(main())
