"""Examples for people: tokens as text, which of them are trained, and a page of them.

The page is one file without anything from elsewhere. All text of rows is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fourbit.data.gate import Report
from fourbit.data.render import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a decoder writes for bytes that are no whole character.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """One token, or the few that make one character: its text, its ids, whether loss falls on it."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


def cells(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Cell]:
    """The tokens of an example. A character that several tokens make, or a space, stays with its token."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[Cell] = []
    pending: list[int] = []
    context: list[int] = []
    for position, index in enumerate(example.input_ids):
        pending.append(index)
        text = _decode(tokenizer, context + pending)[len(_decode(tokenizer, context)) :]
        last = position + 1 == len(example.input_ids)
        # A token whose training differs from the next one's is shown alone, broken or not.
        parts = not last and example.trained[position + 1] != example.trained[position]
        if text.endswith(_BROKEN) and len(pending) < _LONGEST_CHARACTER and not last and not parts:
            continue
        found.append(Cell(text, tuple(pending), example.trained[position], index in special))
        context, pending = pending[-1:], []
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def report_table(lines: Sequence[tuple[str, str, bool]]) -> Table:
    """The lines of a report (`Report.lines`) for a terminal; what deserves attention is yellow."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value, attention in lines:
        table.add_row(name, Text(value, style="yellow" if attention else ""))
    return table


def page(report: Report, rows: Sequence[tuple[Example, list[Cell]]], title: str) -> str:
    """The report and the rows as one HTML page."""
    facts = "".join(
        f"<tr{' class=look' if attention else ''}><th>{escape(name)}<td>{escape(value)}"
        for name, value, attention in report.lines()
    )
    shown = "".join(_row(example, tokens) for example, tokens in rows)
    return _PAGE.format(title=escape(title), facts=facts, rows=shown, style=_STYLE)


def _row(example: Example, tokens: list[Cell]) -> str:
    trained = sum(example.trained)
    body = "".join(map(_token, tokens))
    return (
        f"<section><h2>{escape(example.source)}</h2>"
        f"<p>{len(example.input_ids):,} tokens, {trained:,} trained</p><pre>{body}</pre></section>\n"
    )


def _token(cell: Cell) -> str:
    kind = ("on" if cell.trained else "off") + (" special" if cell.special else "")
    ids = " ".join(map(str, cell.ids))
    title = f"{ids}, {'trained' if cell.trained else 'not trained'}"
    text = escape(cell.text).replace("\n", "<i>\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}</i>\n")
    return f'<span class="{kind}" title="{title}">{text}</span>'


_STYLE = """\
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --soft: #5d6570; --line: #d9dde3;
  --on: #bfe8c6; --on2: #a5dcaf; --ink: #0b3d17; --off: #f1f3f5; --off2: #e6e9ed; --look: #9a3b00; }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --text: #e6e8eb; --soft: #9aa3ad;
  --line: #333941; --on: #1d4d2a; --on2: #276337; --ink: #d6f5dc; --off: #20242a; --off2: #292e35;
  --look: #ffb27a; } }
body { font: 16px/1.5 system-ui, sans-serif; background: var(--back); color: var(--text);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 2rem 0 0; overflow-wrap: anywhere; }
p { margin: .2rem 0 .5rem; color: var(--soft); }
th { text-align: left; vertical-align: top; padding: .15rem 1.5rem .15rem 0; font-weight: 600;
  white-space: nowrap; }
.look td { color: var(--look); }
pre { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  padding: .7rem; border: 1px solid var(--line); border-radius: 6px; }
span { padding: .15em 0; border-radius: 2px; } i { opacity: .5; font-style: normal; }
.on { background: var(--on); color: var(--ink); } .on:nth-child(even) { background: var(--on2); }
.off { background: var(--off); color: var(--soft); } .off:nth-child(even) { background: var(--off2); }
.special { font-weight: 600; font-style: italic; }
"""

_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style></head>
<body><h1>{title}</h1>
<table>{facts}</table>
<p><span class="on">green</span> tokens are trained, <span class="off">gray</span> ones are only read. \
Shades part tokens; <span class="off special">special tokens</span> slant.</p>
{rows}</body></html>
"""
