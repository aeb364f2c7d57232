"""A training step of SmolLM2-135M by length of row and number of threads.

    python benchmarks/scaling.py [--most 8192] [--steps 2] [--json] [--plot FILE.svg]    a quarter of an hour

One row of 256 to 8,192 tokens with activation checkpointing, r = 16 on all linear layers, on one and two
threads: tokens/s, share of the limit of `benchmarks/train_step.py`, and memory above the bare import. Each
point is a process of its own; of its steps the first is not counted. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import train_step
from machine import machine
from sides import Worker, quantize

LENGTHS, THREADS = (256, 512, 1024, 2048, 4096, 8192), (1, 2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=LENGTHS[-1], help="tokens of the longest row")
    parser.add_argument("--steps", type=int, default=2, help="steps that count (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the figures, too")
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="fourbit-scaling-") as folder:
        quantize(Path(folder))
        report["results"] = [
            point(Path(folder), threads, tokens, arguments.steps)
            for threads in THREADS
            for tokens in LENGTHS
            if tokens <= arguments.most
        ]
    print(json.dumps(report) if arguments.json else table(report))
    if arguments.plot:
        plot(report["results"], arguments.plot)
    return 0


def point(folder: Path, threads: int, tokens: int, steps: int) -> dict[str, Any]:
    options = ("--rows=1", f"--tokens={tokens}", f"--threads={threads}")
    worker = Worker(train_step.__file__, "--worker", "fourbit", str(folder), "checkpoint", *options)
    taken = [worker.ask("step") for _ in range(steps + 1)]
    limit = worker.ask("limit")["seconds"]
    worker.end()
    seconds = median(step["seconds"] for step in taken[1:])
    found = {
        "threads": threads,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "share_of_limit": limit / seconds,
        "bytes_above_import": taken[-1]["bytes"],
    }
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def table(report: dict[str, Any]) -> str:
    lines = [f"{key:16} {value}" for key, value in report["machine"].items()]
    lines += ["", f"{'threads':8}{'tokens':>8}{'speed':>14}{'of limit':>10}{'memory':>10}"]
    for row in report["results"]:
        lines.append(
            f"{row['threads']:<8}{row['tokens']:8,}{row['tokens_per_second']:12,.0f}/s"
            f"{row['share_of_limit']:10.0%}{row['bytes_above_import'] / 1e9:7.2f} GB"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for threads in THREADS:
        rows = [row for row in results if row["threads"] == threads]
        lengths = [row["tokens"] for row in rows]
        label = f"{threads} thread{'s' if threads > 1 else ''}"
        speed.plot(lengths, [row["tokens_per_second"] for row in rows], "o-", label=label)
        memory.plot(lengths, [row["bytes_above_import"] / 1e9 for row in rows], "o-", label=label)
    for axes, name in ((speed, "tokens/s"), (memory, "GB above the bare import")):
        axes.set(xscale="log", xlabel="tokens of the row", ylabel=name, ylim=(0, None))
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
