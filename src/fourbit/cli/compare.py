"""`fourbit compare`: train several ways on the same rows and seeds, and say which differences count."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourbit.cli.common import SHORTCUTS, add_config_arguments, console, print_json, stage_progress
from fourbit.config import RunConfig
from fourbit.config_file import dump_config, load_config
from fourbit.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from fourbit.compare.arm import Outcome
    from fourbit.compare.arms import Arm
    from fourbit.compare.result import Comparison
    from fourbit.compare.runner import Job

_RESULT = "comparison.json"


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "compare",
        help="train several ways on the same rows, and say which differences count",
        description="Train QLoRA, 16-bit LoRA and full fine-tuning, or any list of overrides, on the same "
        "rows, the same held-out rows and the same seeds. Each training is a process of its own, one at a "
        "time; one that does not fit in memory is reported and the others go on. The same command again goes "
        "on with what is missing.",
        epilog='example: fourbit compare support.yaml --seeds 0,1,2 --set "full: train.learning_rate=5e-5" '
        "--output runs/methods",
    )
    add_config_arguments(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--methods", metavar="A,B,...", help="of qlora, lora (16-bit base), full (default: all three)"
    )
    group.add_argument(
        "--vary",
        action="append",
        metavar="[NAME:]KEY=VALUE,...",
        help="instead of methods, an arm that overrides these settings; may be repeated",
    )
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N,...", help="training seeds (default 0,1,2)")
    parser.add_argument(
        "--eval-data",
        action="append",
        default=[],
        metavar="FILE",
        help="rows to score (default: held-out rows)",
    )
    parser.add_argument(
        "--eval-rows", type=int, metavar="N", help="score only N of these, drawn by seed; 0 scores none"
    )
    parser.add_argument("--arm", metavar="FOLDER", help=argparse.SUPPRESS)  # the process of one training
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train what is missing, write the page, print the table."""
    if args.arm is not None:
        return _run_arm(Path(args.arm))
    out = console(args.json)
    config, jobs, counts = _jobs(args)
    from fourbit.compare.runner import check, run_all

    check(jobs)
    noun = "training" if len(jobs) == 1 else "trainings"
    out.print(
        f"{len(jobs)} {noun}; {counts['train']:,} rows to train on, {counts['heldout']:,} held out, "
        f"{counts['score']:,} scored",
        highlight=False,
    )
    try:
        outcomes = run_all(
            jobs, [sys.executable, "-m", "fourbit", "compare", "--arm"], lambda *news: _tell(out, *news)
        )
    except KeyboardInterrupt:
        out.print("interrupted, everything is saved; the same command goes on")
        raise
    _finish(Path(args.output), config, jobs, outcomes, counts, args.json, out)
    failed = [job for job, outcome in zip(jobs, outcomes, strict=True) if outcome.status == "failed"]
    return TrainingError.exit_code if failed else 0


def _jobs(args: argparse.Namespace) -> tuple[RunConfig, list[Job], dict[str, int]]:
    """(what all arms share, one job for each seed and arm, number of rows by use)."""
    from fourbit.compare.arms import arm_config
    from fourbit.compare.rows import share_rows
    from fourbit.compare.runner import Job

    if args.config is None and (args.model is None or args.data is None):
        raise ConfigError("give a config file, or --model and --data")
    if args.output is None:
        raise ConfigError("give --output: the folder of the comparison")
    if args.eval_rows is not None and args.eval_rows < 0:
        raise ConfigError(f"--eval-rows {args.eval_rows}: give 0 or more")
    seeds, (arms, shared) = _seeds(args.seeds), _arms(args)
    config = load_config(args.config, shared)
    configs = {arm.name: arm_config(args.config, shared, arm) for arm in arms}
    output = Path(args.output).resolve()  # so that the same command goes on from any folder
    rows = share_rows(config.data, config.train.seed, output / "data", args.eval_data, args.eval_rows)
    jobs = []
    for seed in seeds:
        for arm in arms:
            own = configs[arm.name]
            settings = own.model_copy(
                update={
                    "data": rows.settings(own.data),
                    "train": own.train.model_copy(update={"seed": seed}),
                    "output": str(output / arm.folder / f"seed-{seed}"),
                }
            )
            score = (str(rows.score),) if rows.score is not None else ()
            jobs.append(Job(arm, seed, settings, score, rows.sha256))
    return config, jobs, rows.counts


def _arms(args: argparse.Namespace) -> tuple[list[Arm], list[str]]:
    """(the arms, the overrides that they share): "--set NAME: ..." is for the arm of that name alone."""
    from fourbit.compare.arms import METHODS, method_arms, split_name, varied_arms, with_own_settings

    shared = [
        f"{key}={json.dumps(getattr(args, name))}"
        for name, key in SHORTCUTS.items()
        if getattr(args, name) and name != "output"
    ]
    own: dict[str, list[str]] = {}
    for text in args.overrides:
        name, override = split_name(text)
        (shared if name is None else own.setdefault(name, [])).append(override)
    if args.vary:
        arms = varied_arms(args.vary)
    else:
        methods = args.methods.split(",") if args.methods else METHODS
        arms = method_arms([name.strip() for name in methods if name.strip()])
    return with_own_settings(arms, own), shared


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}: give whole numbers separated by commas, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds {text}: give different numbers from 0 on")
    return seeds


def _run_arm(folder: Path) -> int:
    """The process of one training: started by this command, never by a person."""
    from fourbit.compare.arm import end_with_parent, run_arm

    end_with_parent()
    outcome = run_arm(folder, Console(stderr=True), stage_progress)
    return 0 if outcome.status == "finished" else 1


def _tell(out: Console, number: int, count: int, job: Job, outcome: Outcome | None) -> None:
    name = Text.assemble((f"arm {number} of {count}: {job.arm.name}, seed {job.seed}", "bold"))
    if outcome is None:
        out.print(name)
    elif outcome.status == "finished":
        score = f", {sum(outcome.right):,} of {len(outcome.right):,} right" if outcome.right else ""
        name.append(f": held-out loss {outcome.heldout_loss:.4f}{score}", "not bold")
        out.print(name)
    else:
        from fourbit.compare.page import STATUS

        name.append(f": {STATUS[outcome.status]} ({outcome.reason})", "not bold yellow")
        out.print(name, soft_wrap=True)


def _finish(
    folder: Path,
    config: RunConfig,
    jobs: list[Job],
    outcomes: list[Outcome],
    counts: dict[str, int],
    as_json: bool,
    out: Console,
) -> None:
    from fourbit.compare.page import write_page
    from fourbit.compare.result import compare

    comparison = compare(jobs, outcomes, counts)
    plain = comparison.to_dict()
    (folder / _RESULT).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    path = write_page(folder, comparison, jobs, dump_config(config))
    if as_json:
        print_json({**plain, "page": str(path)})
    else:
        _print(comparison, out)
        out.print(Text(f"wrote {path}"), soft_wrap=True)


def _print(comparison: Comparison, out: Console) -> None:
    from fourbit.compare.page import STATUS, by_figure, cells

    table = _table("arm", "held-out loss", "score", "memory", "time", "trained")
    for arm in comparison.arms:
        table.add_row(Text(arm.name), *map(_two_lines, cells(arm)))
    out.print(table)
    for arm in comparison.arms:
        if arm.reason:
            out.print(Text(f"{arm.name}: {STATUS[arm.status]} ({arm.reason})", "yellow"))
    for figure, items in by_figure(comparison):
        table = _table(figure, "first - second", items[0][0].test, "verdict")
        for item, (size, p, (verdict, _)) in items:
            table.add_row(Text(f"{item.first} - {item.second}"), _two_lines(size), _two_lines(p), verdict)
        out.print(table)
    for note in comparison.notes:
        out.print(Text(note, "yellow"))


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _two_lines(pair: tuple[str, str]) -> Text:
    return Text("\n".join(part for part in pair if part))
