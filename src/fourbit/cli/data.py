"""`fourbit data`: what will be trained on, before a run: a report, and rows as colored tokens."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fourbit.cli.common import add_config_arguments, console, print_json, read_settings, stage_progress
from fourbit.errors import ConfigError
from fourbit.private import open_private

if TYPE_CHECKING:
    from fourbit.config import TrainSettings
    from fourbit.data.gate import Report
    from fourbit.data.render import Example
    from fourbit.data.steps import Fill
    from fourbit.data.view import Cell

_TRAINED = ("black on green", "black on bright_green")
_READ = "dim"


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "data",
        help="show what will be trained on",
        description="Report on the rows of a run and show some as tokens, with those that are trained. "
        "Only the model's tokenizer is loaded, and nothing is written unless --html asks for it.",
        epilog="example: fourbit data --model models/SmolLM2-135M --data tickets.jsonl --rows 2",
    )
    add_config_arguments(parser)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    parser.add_argument("--html", metavar="FILE", help="write the report and the rows as one HTML page")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report and rows; raises DataError for data that would refuse the run."""
    config = read_settings(args)
    if args.rows < 0:
        raise ConfigError(f"--rows {args.rows}: give 0 or more")
    from fourbit.data.gate import prepare
    from fourbit.data.steps import epoch_fill
    from fourbit.data.view import cells, report_table
    from fourbit.model.tokenizer import open_tokenizer

    out = console(args.json)
    model = config.model
    tokenizer = open_tokenizer(model.path, model.revision, model.trust_remote_code)
    with stage_progress("reading", out) as progress:
        prepared = prepare(config.data, tokenizer, config.train.seed, progress)
    rows = [(example, cells(example, tokenizer)) for example in prepared.train[: args.rows]]
    if args.html:
        _write(args.html, prepared.report, rows, f"What is trained: {', '.join(config.data.train)}")
    layouts = {
        settings.end_to_end: epoch_fill(prepared.train, settings) for settings in _layouts(config.train)
    }
    if args.json:
        names = {False: "filled_padded", True: "filled_end_to_end"}
        filled = {names[end_to_end]: fill.share for end_to_end, fill in layouts.items()}
        print_json({**prepared.report.to_dict(), **filled})
        return 0
    if not args.html:
        for example, tokens in rows:
            _show(example, tokens, out)
    out.print(report_table([*prepared.report.lines(), ("filled", _filled(layouts, config.train), False)]))
    if args.html:
        out.print(f"wrote {args.html}, which holds the text of {len(rows):,} rows", highlight=False)
    return 0


def _show(example: Example, tokens: list[Cell], out: Console) -> None:
    trained = sum(example.trained)
    out.print(Text(f"{example.source}  {len(example.input_ids):,} tokens, {trained:,} trained", style="bold"))
    colored = out.color_system is not None
    text = _colored(tokens) if colored else _marked(tokens)
    out.print(text, soft_wrap=not colored, end="\n" if text.plain.endswith("\n") else "\n\n")


def _colored(tokens: list[Cell]) -> Text:
    text = Text()
    for index, cell in enumerate(tokens):
        style = _TRAINED[index % 2] if cell.trained else _READ
        text.append(_visible(cell.text), style=style + (" bold" if cell.special else ""))
    return text


def _marked(tokens: list[Cell]) -> Text:
    """Where there is no color, brackets around what is trained."""
    text, open_ = Text(), False
    for cell in tokens:
        if cell.trained != open_:
            text.append("⟦" if cell.trained else "⟧")
            open_ = cell.trained
        text.append(_visible(cell.text))
    if open_:
        text.append("⟧")
    return text


def _visible(text: str) -> str:
    """Line ends marked, and no control character that could move a terminal's cursor."""
    shown = text.replace("\n", "⏎\n").replace("\t", "    ")
    return "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


def _layouts(train: TrainSettings) -> list[TrainSettings]:
    """The settings for each way that rows may lie: which of two it is under null, the run decides."""
    if train.packing is not None or train.padding_free is not None:
        return [train]
    return [train.model_copy(update={"padding_free": free}) for free in (True, False)]


def _filled(layouts: dict[bool, Fill], train: TrainSettings) -> str:
    if train.packing is not None:
        how = f"packs of up to {train.packing:,}"
        return f"{layouts[True].share:.1%} of the tokens computed in an epoch ({how})"
    names = {True: "end to end", False: "padded"}
    shares = ", ".join(f"{fill.share:.1%} {names[free]}" for free, fill in layouts.items())
    return f"{shares}, of the tokens computed in an epoch (micro-batches of {train.micro_batch:,})"


def _write(path: str, report: Report, rows: list[tuple[Example, list[Cell]]], title: str) -> None:
    from fourbit.data.view import page

    try:
        with open_private(path) as file:
            file.write(page(report, rows, title))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
