"""`fourbit eval`: score a model on a file, the base and its adapter side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourbit.cli.common import console, print_json, stage_progress
from fourbit.cli.subject import Subject, add_subject_arguments, open_subject, read_subject_settings
from fourbit.config import RunConfig
from fourbit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fourbit.data.row import Row
    from fourbit.evaluate.scores import Accuracy
    from fourbit.evaluate.task import EvalResult


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "eval",
        help="score a model, and its adapter beside it",
        description="Score a model on rows it was not trained on: exact match of its answers, with a 95 % "
        "interval, loss, perplexity; base and adapter together. Without --data, on the run's held-out rows.",
        epilog="example: fourbit eval runs/demo --data test.csv --labels-from-column category",
    )
    add_subject_arguments(parser)
    parser.add_argument("--data", action="append", metavar="FILE", help="rows to score; may be repeated")
    parser.add_argument("--limit", type=int, metavar="N", help="score only N rows, drawn by seed")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--labels-from-column", metavar="COLUMN", help="also pick the likeliest of this column's values"
    )
    group.add_argument("--choices", metavar="A,B,...", help="also pick the likeliest of these answers")
    parser.add_argument("--only", choices=("base", "adapter"), help="score only one of the two")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="rows to show (default 3)")
    parser.add_argument("--ignore-case", action="store_true", help="upper and lower case are the same")
    parser.add_argument(
        "--fast", action="store_true", help="break off answers that are already wrong, and leave out the loss"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, progress on standard error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score and print."""
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: give at least 1")
    if args.samples < 0:
        raise ConfigError(f"--samples {args.samples}: give 0 or more")
    if args.model is not None and not args.data:
        raise ConfigError("--model needs --data: the rows to score")
    config = read_subject_settings(args, args.data[0] if args.data else None)
    out = console(args.json)
    rows = _rows(args, config)
    labels = _labels(args, rows)
    subject = open_subject(args, config.model)
    if args.only == "adapter" and not subject.has_adapter:
        raise ConfigError("--only adapter: there is no adapter; give a run folder or --adapter")
    if not args.data:
        rows = _heldout(rows, config, subject)
    rows = _limited(rows, args.limit, config)
    results = _score(args, config, subject, rows, labels, out)
    if args.json:
        print_json({name: result.to_dict() for name, result in results.items()})
    else:
        _print(results, out)
    return 0


def _rows(args: argparse.Namespace, config: RunConfig) -> list[Row]:
    from fourbit.data.read import read_rows

    return read_rows(args.data or config.data.heldout or config.data.train, config.data)


def _heldout(rows: list[Row], config: RunConfig, subject: Subject) -> list[Row]:
    """Of the run's rows, those that it held out: the same split as in training."""
    from fourbit.data.encode import encode, split_rows

    if config.data.heldout:
        return rows
    examples = encode(rows, subject.tokenizer, config.data).examples
    _, heldout = split_rows(examples, config.data.heldout_fraction, config.train.seed)
    if not heldout:
        raise ConfigError("the run held no rows out (data.heldout_fraction is 0); give --data")
    sources = {example.source for example in heldout}
    return [row for row in rows if row.source in sources]


def _limited(rows: list[Row], limit: int | None, config: RunConfig) -> list[Row]:
    from fourbit.data.encode import sample

    return rows if limit is None else sample(rows, limit, config.train.seed)


def _labels(args: argparse.Namespace, rows: Sequence[Row]) -> list[str] | None:
    if args.choices is not None:
        choices = [choice.strip() for choice in args.choices.split(",") if choice.strip()]
        if len(choices) < 2:
            raise ConfigError(f"--choices {args.choices}: give at least two, separated by commas")
        return list(dict.fromkeys(choices))
    if args.labels_from_column is None:
        return None
    column = args.labels_from_column
    missing = next((row for row in rows if column not in row.fields), None)
    if missing is not None:
        raise ConfigError(f"{missing.source}: no column '{column}'{nearest(column, missing.fields)}")
    return sorted({str(row.fields[column]) for row in rows})


def _score(
    args: argparse.Namespace,
    config: RunConfig,
    subject: Subject,
    rows: list[Row],
    labels: list[str] | None,
    out: Console,
) -> dict[str, EvalResult]:
    from fourbit.evaluate.task import evaluate

    wanted = [args.only] if args.only else ["base", "adapter"] if subject.has_adapter else ["base"]
    results: dict[str, EvalResult] = {}
    for name in wanted:
        with stage_progress(name, out) as progress, subject.base() if name == "base" else _unchanged():
            results[name] = evaluate(
                subject.model,
                subject.tokenizer,
                rows,
                config.data,
                config.eval,
                labels=labels,
                loss=not args.fast,
                samples=args.samples,
                complete=not args.fast,
                casefold=args.ignore_case,
                progress=progress,
            )
    return results


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


def _print(results: dict[str, EvalResult], out: Console) -> None:
    first = next(iter(results.values()))
    table = Table(box=box.SIMPLE_HEAD, title=f"{first.rows:,} rows", title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right", no_wrap=True)
    for label, values in _figures(results):
        table.add_row(label, *values)
    out.print(table)
    for name, result in results.items():
        if result.cut:
            cut = f"{name}: {result.cut:,} answers reached eval.max_new_tokens and count as wrong"
            out.print(cut, style="yellow")
    _print_samples(results, out)


def _figures(results: dict[str, EvalResult]) -> Iterator[tuple[str, list[str]]]:
    found = list(results.values())
    if found[0].accuracy is not None:
        yield "exact match [95 %]", [_interval(result.accuracy) for result in found]
    if found[0].choice_accuracy is not None:
        yield "likeliest label [95 %]", [_interval(result.choice_accuracy) for result in found]
    if found[0].loss is not None:
        yield "loss per token", [f"{result.loss.loss:.4f}" if result.loss else "" for result in found]
        yield "perplexity", [f"{result.loss.perplexity:.2f}" if result.loss else "" for result in found]
    yield "seconds", [f"{result.seconds:.0f}" for result in found]


def _interval(accuracy: Accuracy | None) -> str:
    return f"{accuracy.value:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}]" if accuracy else ""


def _print_samples(results: dict[str, EvalResult], out: Console) -> None:
    first = next(iter(results.values()))
    if not first.samples:
        return
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, title="samples", title_justify="left")
    for column in ("prompt", "reference", *results):
        table.add_column(column, overflow="fold")
    for number, sample in enumerate(first.samples):
        answers = [result.samples[number] for result in results.values()]
        # Text, not str: an answer may hold what rich would read as markup.
        table.add_row(
            Text(sample.prompt),
            Text(sample.reference),
            *(Text(answer.answer, "green" if answer.right else "red") for answer in answers),
        )
    out.print(table)
