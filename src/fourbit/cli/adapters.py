"""`fourbit adapters`: list adapters, or combine several of one base into one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourbit.cli.adapter_scores import read_scoring, score_adapters
from fourbit.cli.common import console, print_json, stage_progress
from fourbit.errors import ConfigError, ModelError
from fourbit.limits import parse_json

if TYPE_CHECKING:
    from fourbit.exporting.provenance import Step
    from fourbit.model.combine import Combination

_TYPES = "linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune; the last four also with _svd"


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "adapters",
        help="list adapters, or combine several into one",
        description="List the PEFT adapters below folders, or combine several of one base into one.",
        epilog="example: fourbit adapters combine runs/a=0.7 runs/b=0.3 --type svd --output adapters/ab",
    )
    actions = parser.add_subparsers(dest="action", metavar="list | combine")
    listing = actions.add_parser(
        "list",
        help="the adapters below folders",
        description="Every PEFT adapter below the folders: base, rank, layers, held-out loss, hash, and the "
        "steps that made it. Checkpoints of runs are left out, unless a folder lies among them.",
        epilog="example: fourbit adapters list runs adapters",
    )
    listing.add_argument("folders", nargs="+", metavar="FOLDER")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=run_list)
    _add_combine(actions)
    parser.set_defaults(run=_without_action)


def _add_combine(actions: Any) -> None:
    parser = actions.add_parser(
        "combine",
        help="several adapters of one base into one",
        description="Combine LoRA adapters of one base with weights, into an ordinary PEFT adapter. cat is "
        "exact and adds up the ranks; svd is the nearest of the wanted rank; linear is cheap and rough; "
        "ties, dare and magnitude_prune drop small or random entries before they add. With --data, inputs "
        "and result are scored on its rows.",
        epilog="example: fourbit adapters combine runs/a=0.7 runs/b=0.3 --type svd --output adapters/ab "
        "--data heldout.jsonl --score",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="FOLDER=WEIGHT", help="run or adapter folders and their weights"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the new adapter")
    parser.add_argument("--type", default="svd", help=f"{_TYPES} (default svd)")
    parser.add_argument(
        "--rank", type=int, help="of the result, for svd types (default: the inputs' largest)"
    )
    parser.add_argument("--density", type=float, help="share of entries that ties, dare or pruning keep")
    parser.add_argument(
        "--majority-sign-method", default="total", help="of ties: total (default) or frequency"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops (default 0)")
    parser.add_argument(
        "--same-base", action="store_true", help="the adapters' bases are one model under different names"
    )
    parser.add_argument("--data", action="append", metavar="FILE", help="rows to score on; may be repeated")
    parser.add_argument("--limit", type=int, metavar="N", help="score only N rows, drawn by seed")
    parser.add_argument("--score", action="store_true", help="also the share of right answers (exact match)")
    parser.add_argument("--model", help="base to score on (default: the first run's, or adapter's)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one setting of the scoring, such as data.prompt={text}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, progress on standard error")
    parser.set_defaults(run=run_combine)


def _without_action(args: argparse.Namespace) -> int:
    raise ConfigError("say what to do: `fourbit adapters list FOLDER` or `fourbit adapters combine ...`")


def run_list(args: argparse.Namespace) -> int:
    """Print the adapters; those that cannot be read are named, and make the command fail."""
    from fourbit.model.adapter_folder import find_adapters

    found: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for path in dict.fromkeys(path for folder in args.folders for path in find_adapters(folder)):
        try:
            found.append(_entry(path))
        except ModelError as error:
            unreadable.append(str(error))
    if args.json:
        print_json({"adapters": found, "unreadable": unreadable})
    else:
        _print_list(found, unreadable, console())
    return ModelError.exit_code if unreadable else 0


def _entry(path: Path) -> dict[str, Any]:
    from fourbit.exporting import provenance
    from fourbit.model.adapter_folder import summarize

    steps = provenance.read(path)
    return {
        "name": path.parent.name if path.name == "adapter" else path.name,
        **summarize(path).to_dict(),
        "sha256": provenance.describe("adapter", path).sha256,
        "heldout_loss": _heldout_loss(path, steps),
        "steps": [step.kind for step in steps],
    }


def _heldout_loss(path: Path, steps: list[Step]) -> float | None:
    """What the newest step measured, or the run that the adapter lies in."""
    if steps and steps[-1].effect.get("heldout_loss") is not None:
        return float(steps[-1].effect["heldout_loss"])
    summary = path.parent / "summary.json"
    if path.name != "adapter" or not summary.exists():
        return None
    try:
        loss = parse_json(summary.read_bytes())["heldout_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if loss is None else float(loss)


def _print_list(found: list[dict[str, Any]], unreadable: list[str], out: Console) -> None:
    """A few lines for each: a table of names and paths would not fit a terminal."""
    for entry in found:
        ranks = entry["ranks"]
        rank = f", rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}" if ranks else ""
        alpha = "" if entry["alpha"] is None else f", alpha {entry['alpha']:g}"
        patterns = " (other ranks or alphas in some layers)" if entry["patterns"] else ""
        made = [f"base {Path(entry['base']).name}"] if entry["base"] else []
        if entry["heldout_loss"] is not None:
            made.append(f"held-out loss {entry['heldout_loss']:.4f}")
        made += [" > ".join(entry["steps"])] if entry["steps"] else []
        size = f"{entry['parameters'] / 1e6:.2f} M parameters, {entry['bytes'] / 1e6:.1f} MB"
        lines = [
            f"{entry['variant']}{rank}{alpha}{patterns}, {size}, SHA-256 {entry['sha256'][:12]}",
            f"on {', '.join(entry['targets'])}" if entry["targets"] else "",
            f"whole modules: {', '.join(entry['saved'])}" if entry["saved"] else "",
            "; ".join(made),
        ]
        out.print(Text(entry["folder"], "bold"), soft_wrap=True)
        for line in filter(None, lines):
            out.print(Text(f"  {line}"), soft_wrap=True)
    for line in unreadable:
        out.print(Text(line, "red"), soft_wrap=True)
    if not found and not unreadable:
        out.print("no adapters there")


def run_combine(args: argparse.Namespace) -> int:
    """Combine, score where rows are given, and write the record."""
    from fourbit.exporting import provenance
    from fourbit.model.adapter_folder import adapter_at
    from fourbit.model.combine import combine

    weighted = [(adapter_at(place), weight) for place, weight in map(_input, args.inputs)]
    paths = [path for path, _ in weighted]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice; give each adapter once, with one weight")
    scoring = read_scoring(args, paths)
    chains = [provenance.read(path) for path in paths]
    same_base = args.same_base or _same_base(paths, chains)
    out = console(args.json)
    with stage_progress("combine", out) as progress:
        result = combine(
            weighted,
            args.output,
            args.type,
            rank=args.rank,
            density=args.density,
            majority_sign_method=args.majority_sign_method,
            seed=args.seed,
            same_base=same_base,
            progress=lambda done, total: progress("layers", done, total),
        )
    settings = {
        "type": args.type,
        "weights": [weight for _, weight in weighted],
        "rank": result.rank,
        "density": args.density,
        "majority_sign_method": args.majority_sign_method,
        "seed": args.seed,
    }
    sources = [provenance.describe("adapter", path) for path in paths]
    chain: list[Step] = []
    for steps in chains:
        chain += [step for step in steps if step not in chain]  # what the inputs share is told once
    effect: dict[str, Any] = {"deviation": result.deviation}
    # Written before the scores too, so that an interruption leaves no adapter without its record.
    provenance.write(result.folder, [*chain, provenance.make_step("combine", sources, settings, effect)])
    scores: dict[str, dict[str, Any]] = {}
    if scoring is not None:
        scores = score_adapters(args, *scoring, [*paths, result.folder], out)
        effect |= {**scores[str(result.folder)], "inputs": [scores[str(path)] for path in paths]}
        provenance.write(result.folder, [*chain, provenance.make_step("combine", sources, settings, effect)])
    if args.json:
        print_json(
            {
                "adapter": str(result.folder),
                "rank": result.rank,
                "layers": result.layers,
                "parameters": result.parameters,
                "deviation": result.deviation,
                "scores": scores,
            }
        )
    else:
        _print_combination(result, dict(weighted), scores, out)
    return 0


def _input(word: str) -> tuple[str, float]:
    place, found, number = word.rpartition("=")
    try:
        if not found or not place:
            raise ValueError
        return place, float(number)
    except ValueError:
        raise ConfigError(f"{word}: write it as FOLDER=WEIGHT, such as runs/a=0.7") from None


def _same_base(paths: list[Path], chains: list[list[Step]]) -> bool:
    """Whether the records say that all were made on one base; False where a record does not say."""
    hashes = [
        next((s.sha256 for step in reversed(chain) for s in step.sources if s.role == "base"), None)
        for chain in chains
    ]
    for path, found in zip(paths, hashes, strict=True):
        if found and hashes[0] and found != hashes[0]:
            raise ModelError(
                f"{paths[0]} and {path} were trained on different bases (SHA-256 {hashes[0][:12]} and "
                f"{found[:12]} in their records); say --same-base if that makes no difference"
            )
    return None not in hashes


def _print_combination(
    result: Combination, weights: dict[Path, float], scores: dict[str, dict[str, Any]], out: Console
) -> None:
    exact = result.deviation < 1e-6
    distance = (
        "the weighted sum exactly" if exact else f"{100 * result.deviation:.2g} % away from the weighted sum"
    )
    out.print(
        f"{result.folder}: {result.combination_type} of {len(weights)} adapters, rank {result.rank}, "
        f"{result.layers:,} layers, {result.parameters / 1e6:.2f} M parameters; {distance}",
        highlight=False,
        soft_wrap=True,
    )
    if not scores:
        return
    rows = next(iter(scores.values()))["rows"]
    table = Table(box=box.SIMPLE_HEAD, title=f"{rows:,} rows", title_justify="left")
    table.add_column("adapter", overflow="fold")
    for column in ("weight", "loss", "right [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, score in scores.items():
        weight = weights.get(Path(name))
        found = ""
        if "accuracy" in score:
            found = f"{score['accuracy']:.1%} [{score['low']:.1%}, {score['high']:.1%}]"
        table.add_row(
            Text(name),
            "combined" if weight is None else f"{weight:g}",
            f"{score['heldout_loss']:.4f}",
            found,
        )
    out.print(table)
