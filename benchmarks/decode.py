"""Decoding SmolLM2-135M against transformers with bitsandbytes, alone and in a batch.

    python benchmarks/decode.py [--rounds 5] [--tokens 64] [--threads 2] [--json]

Both load the 4-bit checkpoint that `fourbit quantize` writes, with or without a LoRA adapter of r = 16 whose
B is not zero, and answer the same prompts greedily in bf16, each in a process of its own and in turn. What is
timed are further tokens: an answer of so many more of them less a short one, so that reading the prompts does
not count. Ratios are medians of pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from machine import machine
from sides import Worker, answer_all, quantize

SIDES = ("fourbit", "stock")
CASES = ((1, "base"), (16, "base"), (1, "adapter"), (16, "adapter"))
#: Times as fast as transformers with bitsandbytes.
TARGET = 3.0
SHORT, PROMPT = 4, 24

Answer = Callable[[torch.Tensor, int], object]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are timed (default 64)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "FOLDER", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        side, folder, kind = arguments.worker
        return serve(fourbit_answer if side == "fourbit" else stock_answer, Path(folder), kind == "adapter")
    report: dict[str, Any] = {"machine": machine(), "tokens": arguments.tokens}
    with tempfile.TemporaryDirectory(prefix="fourbit-decode-") as folder:
        quantize(Path(folder))
        make_adapter(Path(folder))
        report["results"] = [compare(Path(folder), rows, kind, arguments) for rows, kind in CASES]
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def make_adapter(folder: Path) -> None:
    import fourbit

    base, _ = fourbit.load(folder / "model", compute_dtype="bfloat16")
    model = fourbit.add_lora(base, r=16, seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.01)
    model.save_pretrained(folder / "adapter")


def compare(folder: Path, rows: int, kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers in turn; the first of each side is not timed."""
    options = (str(folder), kind, f"--threads={arguments.threads}")
    workers = [Worker(__file__, "--worker", side, *options) for side in SIDES]
    question = f"{rows} {arguments.tokens}"
    turns = [[worker.ask(question) for worker in workers] for _ in range(arguments.rounds + 1)]
    for worker in workers:
        worker.end()
    seconds = [[turn["seconds"] for turn in pair] for pair in turns[1:]]
    done = rows * arguments.tokens
    return {
        "rows": rows,
        "kind": kind,
        "tokens_per_second": {
            side: done / median(pair[i] for pair in seconds) for i, side in enumerate(SIDES)
        },
        "ratio": median(theirs / ours for ours, theirs in seconds),
        "target": TARGET,
        "seconds": seconds,
    }


def serve(make: Callable[[Path, bool], Answer], folder: Path, adapter: bool) -> int:
    """Time answers as asked for on stdin."""
    answer = make(folder, adapter)

    def timed(question: str) -> dict[str, Any]:
        rows, tokens = map(int, question.split())
        ids = torch.randint(1000, 40000, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
        taken = []
        for length in (SHORT, SHORT + tokens):
            began = perf_counter()
            answer(ids, length)
            taken.append(perf_counter() - began)
        return {"seconds": taken[1] - taken[0]}

    return answer_all(timed)


def fourbit_answer(folder: Path, adapter: bool) -> Answer:
    import fourbit
    from fourbit.evaluate.generate import generate
    from fourbit.model.adapters import load_adapter

    model: Any = fourbit.load(folder / "model", compute_dtype="bfloat16")[0]
    if adapter:
        model = load_adapter(model, folder / "adapter")
    return lambda ids, length: generate(model, ids.tolist(), (), length, batch_size=len(ids))


def stock_answer(folder: Path, adapter: bool) -> Answer:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    if adapter:
        model = PeftModel.from_pretrained(model, str(folder / "adapter"))
    model.eval()

    def answer(ids: torch.Tensor, length: int) -> object:
        with torch.inference_mode():
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
            )

    return answer


def table(report: dict[str, Any]) -> str:
    lines = [f"{key:16} {value}" for key, value in report["machine"].items()]
    lines += ["", f"SmolLM2-135M, prompts of {PROMPT} tokens, {report['tokens']} tokens timed", ""]
    lines.append(f"{'rows':>4} {'':10}{'fourbit':>14}{'stock':>14}{'ratio':>8}{'target':>8}")
    for row in report["results"]:
        speeds = "".join(f"{row['tokens_per_second'][side]:12,.0f}/s" for side in SIDES)
        lines.append(f"{row['rows']:4} {row['kind']:10}{speeds}{row['ratio']:7.1f}x{row['target']:7.1f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
