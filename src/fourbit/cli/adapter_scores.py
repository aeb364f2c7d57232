"""Scores of several adapters of one base, for `fourbit adapters combine`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fourbit.cli.common import stage_progress
from fourbit.config import RunConfig
from fourbit.config_file import load_config
from fourbit.errors import ConfigError

if TYPE_CHECKING:
    from fourbit.data.row import Row


def read_scoring(args: argparse.Namespace, paths: list[Path]) -> tuple[RunConfig, list[Row]] | None:
    """Settings and rows to score with, read before anything is computed; None without --data.

    Raises ConfigError and DataError.
    """
    if not args.data:
        if args.score or args.limit is not None:
            raise ConfigError("--score and --limit need --data: the rows to score on")
        return None
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: give at least 1")
    from fourbit.data.encode import sample
    from fourbit.data.read import read_rows
    from fourbit.model.adapter_folder import read_config

    run = next((path.parent for path in paths if (path.parent / "config.yaml").exists()), None)
    shortcuts = [] if args.model is None else [f"model.path={json.dumps(args.model)}"]
    if run is None:
        base = args.model or read_config(paths[0]).get("base_model_name_or_path")
        shortcuts = [f"model.path={json.dumps(base)}", f"data.train={json.dumps(args.data)}"]
    config = load_config(run / "config.yaml" if run else None, [*shortcuts, *args.overrides])
    rows = read_rows(args.data, config.data)
    return config, rows if args.limit is None else sample(rows, args.limit, config.train.seed)


def score_adapters(
    args: argparse.Namespace, config: RunConfig, rows: list[Row], paths: list[Path], out: Console
) -> dict[str, dict[str, Any]]:
    """Held-out loss, and with --score accuracy, of each adapter on one base in memory."""
    from fourbit.data.encode import encode
    from fourbit.evaluate.heldout import heldout_loss
    from fourbit.evaluate.task import evaluate
    from fourbit.model.adapter_set import AdapterSet
    from fourbit.model.load import load

    base, tokenizer = load(config.model.path, **config.model.model_dump(exclude={"path"}))
    adapters = AdapterSet(base)
    for path in dict.fromkeys(paths):
        adapters.add(str(path), path)
    examples = encode(rows, tokenizer, config.data).examples
    scores: dict[str, dict[str, Any]] = {}
    for name in adapters.names:
        with stage_progress(name, out) as progress, adapters.using(name) as model:
            loss = heldout_loss(
                model,
                examples,
                tokenizer.pad_token_id or 0,
                progress=lambda done, total, report=progress: report("loss", done, total),  # type: ignore[misc]
            )
            scores[name] = {"rows": len(rows), "heldout_loss": loss.loss, "perplexity": loss.perplexity}
            if args.score:
                found = evaluate(
                    model,
                    tokenizer,
                    rows,
                    config.data,
                    config.eval,
                    loss=False,
                    samples=0,
                    complete=False,
                    progress=progress,
                ).accuracy
                assert found is not None  # plain text was refused
                scores[name] |= {"accuracy": found.value, "low": found.low, "high": found.high}
    return scores
