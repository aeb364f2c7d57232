"""Started by torchrun in every process of a run: `test_processes` reads what it leaves in the folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fourbit.config import RunConfig
from fourbit.config_file import resolve
from fourbit.processes import join
from fourbit.training import loop, run
from fourbit.training.prepare import prepare_model
from fourbit.training.shards import shard_base, shares_bytes


def config_of(folder: Path, output: str, mixture: bool = False, **train: Any) -> RunConfig:
    """Six steps of two micro-batches each, with dropout; the last is short of rows."""
    model, dropout = (folder / "mixture", 0.0) if mixture else (folder / "model", 0.1)
    return resolve(
        {
            "model": {"path": str(model), "device": "cpu", "compute_dtype": "bfloat16"},
            "lora": {"r": 4, "dropout": dropout},
            "data": {"train": [str(folder / "rows.jsonl")], "max_length": 64, "heldout_fraction": 0.2},
            "train": {
                "effective_batch": 8, "micro_batch": 4, "max_steps": 6, "epochs": 3, "eval_every": 2,
                "learning_rate": 0.01, **train,
            },
            "output": str(folder / output),
        }
    )  # fmt: skip


def run_out_of_memory_once(rank: int, micro_batch: int) -> None:
    """In one process alone, in the second of its micro-batches of the run to come."""
    original, calls = loop.causal_lm_loss, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == micro_batch and join().rank == rank:
            raise MemoryError
        return original(*arguments)

    loop.causal_lm_loss = failing


def main(folder: Path) -> None:
    quiet, rank = Console(quiet=True), join().rank
    for name, changes in (
        ("replicated", dict[str, Any]()),
        ("shared", {"shard_weights": True}),
        ("uneven", {"micro_batch": 3}),
        ("uneven-shared", {"micro_batch": 3, "shard_weights": True}),
        ("mixture-shared", {"mixture": True, "shard_weights": True}),
    ):
        if shares_bytes() or "shard_weights" not in changes:
            run.run(config_of(folder, name, **changes), quiet, predict=True)
    # Stopped in the middle and gone on with: shares of the base first, the whole of it then.
    run.run(config_of(folder, "resumed", max_steps=4, shard_weights=shares_bytes()), quiet)
    join().wait()
    run.run(config_of(folder, "resumed"), quiet, resume=True)
    run_out_of_memory_once(1, 2)
    run.run(config_of(folder, "short"), quiet)
    if not shares_bytes():
        return
    model, _ = prepare_model(config_of(folder, "unused", shard_weights=True), quiet)
    layers = model.get_base_model().model.layers
    frozen = [p for p in layers.parameters() if not p.requires_grad]
    before = sum(p.nbytes for p in frozen)
    shard_base(model, torch.device("cpu"))
    after = sum(p.to_local().nbytes for p in layers.parameters() if not p.requires_grad)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not any(hasattr(p, "device_mesh") for p in trained)
    (folder / f"bytes-{rank}.json").write_text(json.dumps([before, after]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
