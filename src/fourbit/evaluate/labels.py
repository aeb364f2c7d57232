"""Answers as token ids: exactly those that training on a row with this answer would train.

They are cut from the rendered and tokenised whole, not tokenised on their own: what stands before an
answer can change its first token, and the chat template decides what ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fourbit.config import DataSettings
from fourbit.data.encode import prompt_only
from fourbit.data.forms import Conversation, Document, interpret
from fourbit.data.render import Renderer
from fourbit.data.row import Row
from fourbit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_ids(
    answers: Sequence[str], row: Row, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> list[list[int]]:
    """Token ids of each answer as the reply to this row's prompt, the end of the turn included.

    Raises DataError if an answer's first token would merge with the end of the prompt.
    """
    rows = [_with_answer(row, answer, tokenizer, settings) for answer in answers]
    as_given = {"format": "auto", "prompt": None, "completion": None, "loss": "completions"}
    plain = settings.model_copy(update=as_given)
    renderer = Renderer(tokenizer, plain)
    rendered = [renderer.text(changed) for changed in rows]
    prompt, _ = prompt_only(row, tokenizer, settings)
    found: list[list[int]] = []
    for answer, item, tokens in zip(
        answers, rendered, renderer.tokenize([item.text for item in rendered]), strict=True
    ):
        example = renderer.examples(item, tokens)[0]
        if example.input_ids[: len(prompt)] != prompt:
            raise DataError(
                f"{row.source}: the answer {answer!r} merges with the last token of the prompt; "
                "end the prompt with a line break"
            )
        tail = zip(example.input_ids[len(prompt) :], example.trained[len(prompt) :], strict=True)
        found.append([token for token, trained in tail if trained])
    return found


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends the model's turn, as training teaches it: from the chat template, else eos."""
    settings = DataSettings(train=("probe",))
    row = Row({"prompt": "a\n", "completion": "b"}, "probe", 1)
    return answer_ids(["b"], row, tokenizer, settings)[0][-1]


def _with_answer(row: Row, answer: str, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> Row:
    content = interpret(row, settings, chat=bool(tokenizer.chat_template))
    if isinstance(content, Document):
        raise DataError(
            f"{row.source}: plain text has no prompt to answer; use prompt and completion columns"
        )
    if isinstance(content, Conversation):
        reply = {**content.messages[-1], "content": answer}
        return Row({"messages": [*content.messages[:-1], reply]}, row.file, row.line)
    return Row({"prompt": content.prompt, "completion": answer}, row.file, row.line)
