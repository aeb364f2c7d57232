"""What a row means: a conversation, a prompt with its completion, or a document.

The form follows from the names of the columns, or from the settings where they say so:

    form                columns                                becomes
    messages            messages, or conversations (ShareGPT)  Conversation
    prompt_completion   prompt + completion, or any columns    Pair
                        through two templates in the settings
    instruction         instruction + output, input optional   Pair
    question_answer     question + answer, or query + response Pair
    text                text                                   Document
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

from fourbit.config import DataSettings
from fourbit.data.row import Row, RowError, blank_row, kind_of
from fourbit.data.turns import Message, check_message, check_tools
from fourbit.errors import DataError, nearest

Form = Literal["messages", "prompt_completion", "instruction", "question_answer", "text"]

#: Each form's columns in the order in which they are looked for; `|` separates names for the same thing.
COLUMNS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages|conversations",),
    "prompt_completion": ("prompt", "completion|response"),
    "instruction": ("instruction", "output|response"),
    "question_answer": ("question|query", "answer|response"),
    "text": ("text",),
}

#: Prompts of a model without a chat template: those of Alpaca as QLoRA trained with them.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns with `role` and `content`; at least one is the assistant's, and so is the last.

    tools  descriptions of the functions that the assistant may call, for the chat template
    """

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the answer to it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, all of it trained on."""

    text: str


def form_of(row: Row, settings: DataSettings) -> Form:
    """The form of a row; raises DataError if its columns fit none, or not the one of the settings."""
    if settings.prompt is not None and settings.completion is not None:
        if settings.format not in ("auto", "prompt_completion"):
            raise DataError(
                f"data.format is {settings.format}, but data.prompt and data.completion make "
                "prompt_completion; drop the templates or the format"
            )
        for name, template in (("prompt", settings.prompt), ("completion", settings.completion)):
            _columns_of(template, name, row)
        return "prompt_completion"
    if settings.format != "auto":
        _require(row, settings.format)
        return settings.format
    if "chosen" in row.fields and "rejected" in row.fields:
        raise DataError(
            f"{row.source}: the columns chosen and rejected are preference pairs, for methods that compare "
            "two answers; to train on the better one, give it as completion, or a conversation as messages"
        )
    for form, columns in COLUMNS.items():
        if all(_present(row, names) for names in columns):
            return form
    raise DataError(
        f"{row.source}: cannot tell what to train on from the columns {_list(row.fields)}; "
        "name them messages, prompt and completion, instruction and output, question and answer, or text, "
        "or set data.prompt and data.completion"
    )


def interpret(row: Row, settings: DataSettings, *, chat: bool) -> Conversation | Pair | Document:
    """The content of a row, its types checked.

    `chat` says whether the model has a chat template: an instruction is then the plain user turn, and
    without one it stands in the Alpaca prompt. Raises DataError, naming the row and its column.
    """
    if not row.fields:
        raise blank_row(row)
    form = form_of(row, settings)
    if form == "messages":
        return _conversation(row, chat)
    if form == "text":
        text = _text(row, "text")
        if not text.strip():
            raise RowError("empty", f"{row.source}: 'text' is empty; remove the row")
        return Document(text)
    if form == "instruction":
        return _pair(row, _instruction(row, chat), *_answer(row, form))
    if form == "question_answer":
        question = next(name for name in ("question", "query") if name in row.fields)
        return _pair(row, _text(row, question), *_answer(row, form))
    if settings.prompt is not None and settings.completion is not None:
        return _pair(row, _fill(settings.prompt, row), _fill(settings.completion, row), "the completion")
    return _pair(row, _text(row, "prompt"), *_answer(row, form))


def _conversation(row: Row, chat: bool) -> Conversation:
    if not chat:
        raise DataError(
            f"{row.source}: chat messages need a model with a chat template and this one has none; "
            "use an instruct model or prompt and completion columns"
        )
    column = "messages" if "messages" in row.fields else "conversations"
    value = row.fields[column]
    if not isinstance(value, list):
        raise RowError(
            "refused",
            f"{row.source}: '{column}' is {kind_of(value)}, must be a list of objects with role and content",
        )
    messages = [check_message(item, f"{row.source}: message {n}") for n, item in enumerate(value, start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(
            "no_trained_token",
            f"{row.source}: the conversation has no assistant turn, so there is nothing to train on; "
            "add one or remove the row",
        )
    if messages[-1]["role"] != "assistant":
        raise RowError(
            "no_end_token",
            f"{row.source}: the conversation ends with a {messages[-1]['role']} turn, must end with the "
            "assistant's; cut it after the last answer",
        )
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not (message["content"].strip() or message.get("tool_calls")):
            raise RowError(
                "empty",
                f"{row.source}: message {number}: the assistant's content is empty; "
                "fill it or remove the row",
            )
    return Conversation(messages, check_tools(row.fields.get("tools"), row.source))


def _instruction(row: Row, chat: bool) -> str:
    instruction = _text(row, "instruction")
    extra = _text(row, "input") if row.fields.get("input") is not None else ""
    if chat:
        return f"{instruction}\n\n{extra}" if extra else instruction
    template = ALPACA_PROMPT_WITH_INPUT if extra else ALPACA_PROMPT
    return template.format(instruction=instruction, input=extra)


def _answer(row: Row, form: Form) -> tuple[str, str]:
    """The answer of a row, and how a message names its column."""
    name = next(name for name in COLUMNS[form][1].split("|") if name in row.fields)
    return _text(row, name), f"'{name}'"


def _pair(row: Row, prompt: str, completion: str, name: str) -> Pair:
    if not completion.strip():
        raise RowError(
            "empty",
            f"{row.source}: {name} is empty, so there is nothing to train on; fill it or remove the row",
        )
    return Pair(prompt, completion)


def _text(row: Row, column: str) -> str:
    value = row.fields[column]
    if not isinstance(value, str):
        raise DataError(f"{row.source}: '{column}' is {kind_of(value)}, must be text")
    return value


def _fill(template: str, row: Row) -> str:
    """A template over columns; a value that is not text is written as Python writes it."""
    parts: list[str] = []
    for literal, column, _, _ in Formatter().parse(template):
        parts.append(literal)
        if column is not None:
            value = row.fields[column]
            if value is None or isinstance(value, list | dict):
                raise DataError(f"{row.source}: '{column}' is {kind_of(value)}, must be text or a number")
            parts.append(str(value))
    return "".join(parts)


def _columns_of(template: str, setting: str, row: Row) -> None:
    """Raise DataError unless every `{name}` of the template is a column of the row."""
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(
            f"data.{setting} {template!r}: {error}; write columns as {{name}} and braces as {{{{ }}}}"
        ) from None
    for column, spec, conversion in fields:
        if spec or conversion:
            raise DataError(
                f"data.{setting} {template!r}: '{column}' carries a format; write columns as {{name}} alone"
            )
        if column not in row.fields:
            hint = nearest(column or "", row.fields)
            raise DataError(
                f"{row.source}: data.{setting} uses the column '{column}'{hint}, "
                f"but the row has {_list(row.fields)}"
            )


def _require(row: Row, form: Form) -> None:
    for names in COLUMNS[form]:
        if not _present(row, names):
            wanted = names.split("|")
            unused = [name for name in row.fields if name not in COLUMNS[form]]
            hint = next((close for name in wanted if (close := nearest(name, unused))), "")
            raise DataError(
                f"{row.source}: format {form} needs the column {' or '.join(map(repr, wanted))}{hint}, "
                f"but the row has {_list(row.fields)}"
            )


def _present(row: Row, names: str) -> bool:
    return any(name in row.fields for name in names.split("|"))


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
