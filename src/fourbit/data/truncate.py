"""What becomes of rows longer than max_length, as `data.too_long` says. None is cut inside an answer.

drop          the row is left out
split_turns   a conversation becomes several, each beginning with a user turn and the system message, so that
              every answer is trained once; an exchange that is too long by itself is left out
keep_end      the beginning is cut off, but for a first bos token; the row is left out if its last answer does
              not fit, and an answer that the cut would halve is not trained
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

from fourbit.config import DataSettings
from fourbit.data.forms import Conversation, interpret
from fourbit.data.render import Example
from fourbit.data.row import Row
from fourbit.data.turns import Message


def keep_end(example: Example, max_length: int, bos: int | None, loss: str) -> Example | None:
    """The last `max_length` tokens of an example, or None if its last answer is not among them whole."""
    head = [bos] if bos is not None and example.input_ids[0] == bos else []
    cut = len(example.input_ids) - (max_length - len(head))
    trained = list(example.trained)
    if loss != "all":
        position = 0
        for on, run in groupby(example.trained):
            end = position + len(list(run))
            # The token before an answer predicts its first one, so it must be there too.
            if on and position <= cut:
                trained[position:end] = [False] * (end - position)
            position = end
        last = len(trained) - 1 - example.trained[::-1].index(True)
        if not trained[last]:
            return None
    kept = [*([False] * len(head)), *trained[cut:]]
    kept[len(head)] = False  # predicted by a token that is no longer there
    ids = [*head, *example.input_ids[cut:]]
    return replace(example, input_ids=ids, trained=kept, prompt_tokens=kept.index(True))


def split_turns(
    row: Row, settings: DataSettings, chat: bool, fits: Callable[[Row], bool]
) -> tuple[list[Row], int]:
    """(rows that fit and hold each answer of a conversation once, exchanges that fit in none).

    A row that is no conversation is one exchange.
    """
    content = interpret(row, settings, chat=chat)
    if not isinstance(content, Conversation):
        return [], 1
    system, exchanges = _exchanges(content.messages)
    pieces: list[Row] = []
    lost, start = 0, 0
    while start < len(exchanges):
        best, end = None, start + 1
        while end <= len(exchanges):
            turns = [turn for exchange in exchanges[start:end] for turn in exchange]
            candidate = Row({"messages": system + turns, "tools": content.tools}, row.file, row.line)
            if not fits(candidate):
                break
            best, end = candidate, end + 1
        if best is None:
            lost, start = lost + 1, start + 1
        else:
            pieces.append(best)
            start = end - 1
    return pieces, lost


def _exchanges(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages that come first; the turns from a user turn to the next that follows an answer."""
    first = next(i for i, message in enumerate(messages) if message["role"] not in ("system", "developer"))
    exchanges: list[list[Message]] = []
    for message in messages[first:]:
        answered = bool(exchanges) and exchanges[-1][-1]["role"] == "assistant"
        if not exchanges or (message["role"] == "user" and answered):
            exchanges.append([])
        exchanges[-1].append(message)
    return messages[:first], exchanges
