"""Conversations to text through the model's own chat template, and which of its characters are answers.

Most templates do not mark what the assistant wrote, so it is found by rendering prefixes. For the
assistant turn at index k of `messages`

    before = template(messages[:k], add_generation_prompt=True)     what the model sees at inference
    upto   = template(messages[:k + 1])                             the same with the answer

and the answer is the text by which `upto` goes on after `before`, up to and including the first special
token with which the template closes a turn: what the model must write, its stop included. What follows
that token (a newline, mostly) the model never writes, and it is not trained. What closes a turn is
learned from the template once, with an answer that is known.

Both prefixes must begin the whole conversation. Templates that rewrite earlier turns (that drop earlier
thinking, or move the system text) break this; their conversations are refused, not masked by guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fourbit.data.forms import Message
from fourbit.data.tokens import Span
from fourbit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "fourbit-probe-of-the-closing"


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._closing: tuple[str, int] | None = None

    def text(self, messages: list[Message], where: str, *, answer_next: bool = False) -> str:
        """The conversation as text; with `answer_next`, up to where the assistant would go on.

        Raises DataError beginning with `where` if the template refuses the conversation.
        """
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise DataError(
                f"{where}: the chat template refuses the conversation ({reason}); change the row"
            ) from None
        assert isinstance(text, str)
        return text

    def answers(self, messages: list[Message], where: str) -> tuple[str, list[Span]]:
        """The conversation as text and the span of characters of each assistant turn, its end included.

        Raises DataError beginning with `where` if the prefixes of the conversation do not nest or the
        template writes nothing that ends a turn.
        """
        whole = self.text(messages, where)
        closing, kept = self._close(where)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = f"{where}: message {index + 1}"
            if index == 0:
                raise DataError(
                    f"{where}: the conversation begins with the assistant, so there is nothing it answers; "
                    "begin with a user turn"
                )
            before = self.text(messages[:index], where, answer_next=True)
            last = index + 1 == len(messages)
            upto = whole if last else self.text(messages[: index + 1], where)
            if not upto.startswith(before):
                raise DataError(
                    f"{turn}: the chat template begins this turn otherwise than its own "
                    "generation prompt, so training would differ from inference; repair the template"
                )
            if not upto.endswith(closing) or len(upto) - len(closing) < len(before):
                raise DataError(
                    f"{turn}: the chat template does not end this turn with {closing!r} as it "
                    "ends others, so its end token cannot be found; change the message or the template"
                )
            end = len(upto) - len(closing) + kept
            if not whole.startswith(upto[:end]):
                raise DataError(
                    f"{turn}: the chat template rewrites this turn, or one before it, when the "
                    "conversation goes on, so training would differ from inference; "
                    "split the row so that its only assistant turn is the last"
                )
            spans.append((len(before), end))
        return whole, spans

    def _close(self, where: str) -> tuple[str, int]:
        """What the template writes after an answer, and how many of its characters end the turn."""
        if self._closing is None:
            probe: list[Message] = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": _PROBE},
            ]
            text = self.text(probe, where)
            found, _, closing = text.rpartition(_PROBE)
            if not found and not text.startswith(_PROBE):
                raise DataError(
                    f"{where}: the chat template does not write what the assistant says; repair the template"
                )
            kept = _end_of_turn(closing, self._tokenizer)
            if not kept:
                raise DataError(
                    f"{where}: the chat template writes nothing that ends an assistant turn, so the model "
                    "would not learn to stop; add the eos token to the template"
                )
            self._closing = closing, kept
        return self._closing


def _end_of_turn(closing: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The length of `closing` up to the end of its first special token, or of its text if it has none."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [token for token in special if token in closing]
    if not found:
        return len(closing.rstrip())
    first = min(found, key=lambda token: (closing.index(token), -len(token)))
    return closing.index(first) + len(first)
