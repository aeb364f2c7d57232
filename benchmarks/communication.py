"""What two processes on this machine send each other in a step, beside the formulas of docs/scaling.md.

    torchrun --standalone --nproc-per-node 2 benchmarks/communication.py

SmolLM2-135M, 8 rows of 128 tokens a step in micro-batches of 2, r = 16 on all linear layers. Bytes are those
that the loopback device received in a run of three steps less those in a run of one, so that meeting and
parting do not count; nothing else may use the device meanwhile (Linux).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import write_rows
from rich.console import Console
from sides import demo_model

from fourbit.config_file import resolve
from fourbit.processes import join
from fourbit.training import run

ROWS, MICRO, TOKENS = 8, 2, 128


def main() -> int:
    processes = join()
    place = [tempfile.mkdtemp(prefix="fourbit-communication-")]
    torch.distributed.broadcast_object_list(place)
    folder = Path(place[0])
    if processes.leads:
        write_rows(folder / "rows.jsonl", 4 * ROWS, TOKENS)
    processes.wait()
    for shared in (False, True):
        first, _ = received(folder, 1, shared)
        third, metrics = received(folder, 3, shared)
        if processes.leads:
            print(line(shared, (third - first) / 2 / processes.size, metrics, processes.size))
    return 0


def received(folder: Path, steps: int, shared: bool) -> tuple[int, dict[str, Any]]:
    """Bytes that all processes received in a run, and what it says of itself."""
    settings = {
        "model": {"path": str(demo_model()), "device": "cpu"},
        "data": {"train": [str(folder / "rows.jsonl")], "max_length": TOKENS, "heldout_fraction": 0},
        "train": {
            "effective_batch": ROWS, "micro_batch": MICRO, "max_steps": steps, "shard_weights": shared,
        },
        "output": str(folder / "run"),
    }  # fmt: skip
    join().wait()
    before = loopback()
    metrics = run.run(resolve(settings), Console(quiet=True), overwrite=True, predict=True).metrics
    join().wait()
    return loopback() - before, metrics


def loopback() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def line(shared: bool, measured: float, metrics: dict[str, Any], size: int) -> str:
    trained = metrics["trainable_parameters"]
    formula = 2 * (size - 1) / size * 4 * trained
    if shared:
        parts = {part["name"]: part["size"] for part in metrics["plan"]["held"]}
        depth = 30  # of SmolLM2; the plan counts a share and two layers
        layers = parts["packed weights"] / (1 / size + 2 / depth)
        formula += 2 * (ROWS // MICRO // size) * (size - 1) / size * layers
    name = "shares of the base" if shared else "whole base in each"
    return f"{name:20} {measured / 1e6:8.1f} MB a step and process, {formula / 1e6:8.1f} by the formula"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
