"""The plan that a budget is given: its speed beside every other that fits, its time beside the predicted one.

    python benchmarks/choices.py                       an idle machine; half an hour
    python benchmarks/choices.py --case smollm2:16x64:850MB

A case is `MODEL:ROWSxTOKENS:BUDGET` with the models of benchmarks/memory.py: `fourbit train --memory BUDGET`
on optimizer steps of so many rows of so many tokens, r = 16 on all linear layers. Its whole duration is set
against the predicted one. Then every choice that fits the budget trains a few steps, and the quickest of them
and the plan's once more in turn, which is what counts: medians of seconds a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory import model_path, write_model, write_rows

CASES = ("smollm2:16x64:850MB", "smollm2:4x512:1GB", "qwen-100m:4x512:900MB")
#: Steps of the whole run, of a trial, and the quickest choices that are tried again so often.
WHOLE, TRIAL, QUICKEST, AGAIN = 12, 3, 3, 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", help="run this case, in place of the three")
    parser.add_argument("--json", action="store_true", help="print one JSON object a case, not text")
    arguments = parser.parse_args(argv)
    for case in arguments.case or CASES:
        with tempfile.TemporaryDirectory(prefix="fourbit-choices-") as folder:
            result = measure(case, Path(folder))
        print(json.dumps(result) if arguments.json else text(result), flush=True)
    return 0


def measure(case: str, folder: Path) -> dict[str, Any]:
    from fourbit.memory.plan import Choice
    from fourbit.memory.sizes import parse_size

    model, size, budget = case.split(":")
    rows, tokens = map(int, size.split("x"))
    memory = parse_size(budget)
    write_model(model, folder)
    files = [
        write_rows(folder / "train.jsonl", rows * WHOLE, tokens),
        write_rows(folder / "held.jsonl", 1, tokens),
    ]
    settings = {
        "model.path": model_path(model, folder), "model.device": "cpu", "data.train": files[0],
        "data.heldout": files[1], "data.max_length": tokens, "lora.r": 16, "train.effective_batch": rows,
        "output": folder / "run",
    }  # fmt: skip
    whole = train({**settings, "train.max_steps": WHOLE}, memory)
    chosen = Choice(**whole["plan"]["choice"])
    choices = fitting(settings, memory, rows, tokens)
    seconds = {choice: trial(settings, choice) for choice in choices}
    quickest = sorted(choices, key=seconds.__getitem__)[:QUICKEST]
    rounds = [
        {choice: trial(settings, choice) for choice in dict.fromkeys([chosen, *quickest])}
        for _ in range(AGAIN)
    ]
    again = {choice: statistics.median(found[choice] for found in rounds) for choice in rounds[0]}
    fastest = min(again, key=again.__getitem__)
    return {
        "case": case,
        "seconds": whole["seconds"],
        "predicted_seconds": whole["predicted_seconds"],
        "chosen": asdict(chosen),
        "chosen_step": again[chosen],
        "fastest": asdict(fastest),
        "fastest_step": again[fastest],
        "tried": [{**asdict(choice), "step": seconds[choice]} for choice in choices],
    }


def fitting(settings: dict[str, Any], memory: int, rows: int, tokens: int) -> list[Any]:
    """Every choice whose plan fits."""
    from fourbit.config_file import load_config
    from fourbit.training.planner import Planner
    from fourbit.training.target import Rows, Target

    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    planner = Planner(config, Target.of(config, None), Rows(tokens, 1.0, rows * WHOLE, heldout=(1, tokens)))
    return [choice for choice in planner.choices() if planner.plan(choice).most <= memory]


def trial(settings: dict[str, Any], choice: Any) -> float:
    """Seconds of a step, without the first."""
    changes = {
        "train.micro_batch": choice.micro_batch,
        "train.activation_checkpointing": choice.activation_checkpointing,
        "train.loss_chunk": choice.loss_chunk,
        "train.optimizer_memory": choice.optimizer_memory,
        "train.activation_tier": choice.activation_tier,
        "model.weight_tier": choice.weight_tier,
        "train.max_steps": TRIAL,
    }
    train({**settings, **{key: value for key, value in changes.items() if value is not None}}, None)
    lines = (Path(settings["output"]) / "timing.jsonl").read_text().splitlines()
    steps = [line["seconds"] for line in map(json.loads, lines) if "seconds" in line]
    return statistics.median(steps[1:])


def train(settings: dict[str, Any], memory: int | None) -> dict[str, Any]:
    from rich.console import Console

    from fourbit.config_file import load_config
    from fourbit.training import run

    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    result = run.run(config, Console(stderr=True), overwrite=True, predict=memory is not None, memory=memory)
    return result.metrics


def text(result: dict[str, Any]) -> str:
    from fourbit.memory.plan import Choice

    predicted, taken = result["predicted_seconds"], result["seconds"]
    chosen, fastest = result["chosen_step"], result["fastest_step"]
    return "\n".join(
        [
            f"{result['case']}: {len(result['tried'])} choices fit",
            f"duration   {taken:.1f} s, {predicted:.1f} s predicted ({predicted / taken - 1:+.1%})",
            f"chosen     {chosen:.3f} s a step, {Choice(**result['chosen']).text()}",
            f"fastest    {fastest:.3f} s a step, {Choice(**result['fastest']).text()} "
            f"(chosen {chosen / fastest - 1:+.1%})",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
