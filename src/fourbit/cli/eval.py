"""`fourbit eval`: score a model on a file, the base and its adapter side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from fourbit.cli.common import console, print_json, stage_progress
from fourbit.cli.eval_tables import print_choice, print_results, print_tasks
from fourbit.cli.subject import Subject, add_subject_arguments, open_subject, read_subject_settings
from fourbit.config import RunConfig
from fourbit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fourbit.data.row import Row
    from fourbit.evaluate.task import EvalResult

Report = Callable[[str, int, int], None]
Result = TypeVar("Result")


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "eval",
        help="score a model, and its adapter beside it",
        description="Score a model on rows it was not trained on: its answers by the metrics of eval.metrics "
        "(exact match unless set otherwise), loss and perplexity; base and adapter together, with 95 % "
        "intervals and what differs. Without --data, on the run's held-out rows. A run's scores stay in its "
        "folder as evaluation.json, where `fourbit report` finds them.",
        epilog="example: fourbit eval runs/demo --data test.csv --labels-from-column category   |   "
        "fourbit eval runs/maths --data gsm8k.jsonl --set eval.metrics=[number]   |   "
        "fourbit eval runs/demo --data mmlu.jsonl --multiple-choice",
    )
    add_subject_arguments(parser)
    parser.add_argument("--data", action="append", metavar="FILE", help="rows to score; may be repeated")
    parser.add_argument("--limit", type=int, metavar="N", help="score only N rows, drawn by seed")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--labels-from-column", metavar="COLUMN", help="also pick the likeliest of this column's values"
    )
    group.add_argument("--choices", metavar="A,B,...", help="also pick the likeliest of these answers")
    group.add_argument(
        "--multiple-choice",
        action="store_true",
        help="the rows are questions with options (columns question, choices, answer, subject): pick the "
        "likeliest letter, as for MMLU",
    )
    group.add_argument(
        "--lm-eval",
        action="append",
        metavar="TASK.yaml",
        help="run this task of lm-eval-harness instead; may be repeated",
    )
    parser.add_argument("--only", choices=("base", "adapter"), help="score only one of the two")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="rows to show (default 3)")
    parser.add_argument("--ignore-case", action="store_true", help="upper and lower case are the same")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="break off answers, and searches for the likeliest label, that are already wrong; no loss",
    )
    parser.add_argument(
        "--output", metavar="FILE.jsonl", help="also write each row's scores, without its texts"
    )
    parser.add_argument(
        "--with-text",
        action="store_true",
        help="texts of rows too, in --output; samples and confusions, in --json and the run folder",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, progress on standard error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score and print."""
    _check(args)
    config = read_subject_settings(args, args.data[0] if args.data else None)
    out = console(args.json)
    if args.lm_eval:
        _run_tasks(args, config, out)
    elif args.multiple_choice:
        _run_choice(args, config, out)
    else:
        _run_rows(args, config, out)
    return 0


def _check(args: argparse.Namespace) -> None:
    from fourbit.evaluate.rowfile import check_writable

    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: give at least 1")
    if args.samples < 0:
        raise ConfigError(f"--samples {args.samples}: give 0 or more")
    if args.multiple_choice and not args.data:
        raise ConfigError("--multiple-choice needs --data: the file of questions")
    if args.lm_eval and (args.data or args.output):
        raise ConfigError("--lm-eval goes without --data and --output: the task file names its own data")
    if args.model is not None and not args.data and not args.lm_eval:
        raise ConfigError("--model needs --data: the rows to score")
    if args.with_text and not (args.output or args.json or _is_the_runs_own(args)):
        raise ConfigError("--with-text needs --output, --json or a run folder: the place to write them to")
    if args.output:
        check_writable(args.output)


def _run_rows(args: argparse.Namespace, config: RunConfig, out: Console) -> None:
    from fourbit.evaluate.result import differences
    from fourbit.evaluate.rowfile import write_rows
    from fourbit.evaluate.task import evaluate

    rows = _rows(args, config)
    labels = _labels(args, rows)
    subject = _open(args, config)
    if not args.data:
        rows = _heldout(rows, config, subject)
    rows = _limited(rows, args.limit, config)

    def score(report: Report) -> EvalResult:
        return evaluate(
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
            progress=report,
        )

    results = _of_each(args, subject, score, out)
    apart = differences(results["base"], results["adapter"]) if len(results) == 2 else {}
    if args.output:
        write_rows(args.output, results, args.with_text)
    texts = args.with_text
    found = {name: result.to_dict(texts) for name, result in results.items()} | _difference_dict(apart)
    if args.json:
        print_json(found)
    else:
        print_results(results, apart, out)
    _keep(args, found, args.data or ())


def _run_choice(args: argparse.Namespace, config: RunConfig, out: Console) -> None:
    from fourbit.data.read import read_rows
    from fourbit.evaluate.choice import ChoiceResult, differences, evaluate_choice
    from fourbit.evaluate.questions import question_of
    from fourbit.evaluate.rowfile import write_rows

    rows = _limited(read_rows(args.data, config.data, check=question_of), args.limit, config)
    questions = [question_of(row, config.data) for row in rows]
    shown = (
        read_rows([config.eval.shots_file], config.data, check=question_of) if config.eval.shots_file else []
    )
    examples = [question_of(row, config.data) for row in shown]
    subject = _open(args, config)

    def score(report: Report) -> ChoiceResult:
        return evaluate_choice(
            subject.model,
            subject.tokenizer,
            questions,
            config.eval,
            examples=examples,
            progress=lambda done, total: report("questions", done, total),
        )

    results = _of_each(args, subject, score, out)
    apart = differences(results["base"], results["adapter"]) if len(results) == 2 else {}
    if args.output:
        write_rows(args.output, results, args.with_text)
    found = {name: result.to_dict() for name, result in results.items()} | _difference_dict(apart)
    if args.json:
        print_json(found)
    else:
        print_choice(results, apart, out)
    _keep(args, found, args.data)


def _run_tasks(args: argparse.Namespace, config: RunConfig, out: Console) -> None:
    from fourbit.evaluate.lm_eval import TaskScore, check_tasks, score_tasks

    check_tasks(args.lm_eval)
    subject = _open(args, config)

    def score(report: Report) -> list[TaskScore]:
        return score_tasks(subject.model, subject.tokenizer, args.lm_eval, config.eval, limit=args.limit)

    results = _of_each(args, subject, score, out)
    found = {name: [asdict(score) for score in scores] for name, scores in results.items()}
    if args.json:
        print_json(found)
    else:
        print_tasks(results, out)
    _keep(args, {name: {"tasks": scores} for name, scores in found.items()}, args.lm_eval)


def _is_the_runs_own(args: argparse.Namespace) -> bool:
    return args.run_folder is not None and args.adapter is None


def _keep(args: argparse.Namespace, found: dict[str, Any], data: Sequence[str]) -> None:
    """Leave the scores in the run folder: last, so that they have been shown whatever the disk says."""
    from fourbit.evaluate.kept import keep

    if _is_the_runs_own(args):
        keep(Path(args.run_folder), found, data, args.overrides)


def _open(args: argparse.Namespace, config: RunConfig) -> Subject:
    subject = open_subject(args, config.model)
    if args.only == "adapter" and not subject.has_adapter:
        raise ConfigError("--only adapter: there is no adapter; give a run folder or --adapter")
    return subject


def _of_each(
    args: argparse.Namespace, subject: Subject, score: Callable[[Report], Result], out: Console
) -> dict[str, Result]:
    """The result of the base, the adapter, or both, by name."""
    wanted = [args.only] if args.only else ["base", "adapter"] if subject.has_adapter else ["base"]
    results: dict[str, Result] = {}
    for name in wanted:
        with stage_progress(name, out) as report, subject.base() if name == "base" else _unchanged():
            results[name] = score(report)
    return results


def _difference_dict(found: dict[str, Any]) -> dict[str, Any]:
    return {"difference": {name: asdict(value) for name, value in found.items()}} if found else {}


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


@contextmanager
def _unchanged() -> Iterator[None]:
    yield
