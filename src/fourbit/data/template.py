"""Conversations to text through the model's own chat template, and which of its characters are answers.

Most templates do not mark what the assistant wrote, so it is found by rendering prefixes. For the
assistant turn at index k of `messages`

    before = template(messages[:k], add_generation_prompt=True)     what the model sees at inference
    upto   = template(messages[:k + 1])                             the same with the answer

and the answer is the text by which `upto` goes on after `before`, up to and including the first special
tokens with which the template closes a turn: what the model must write, its stop included. What follows
(a newline, mostly) the model never writes, and it is not trained. What closes a turn is learned from the
template once, with an answer that is known.

If every turn's prefix up to that end begins the whole conversation, the conversation is one text. Templates
that drop earlier thinking, move the system text or close the last turn differently break this: then each
assistant turn becomes a text of its own, what the model sees before it and what it should answer.

Three things templates do are made good, because otherwise training would differ from inference:

- The generation prompt is not how the written turn begins: the answer follows the generation prompt. If that
  opens a thinking block (DeepSeek R1, QwQ), the turn's own thinking, or none, stands inside and closes it.
- The template drops the thinking of the very turn that is trained: the turn is written as the row has it.
- The template ends no turn: the tokenizer's eos token does.

A turn of which the template leaves out anything else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fourbit.data.row import RowError
from fourbit.data.tokens import Span
from fourbit.data.turns import (
    Message,
    open_thought,
    split_thought,
    thought_at_end,
    without_thought,
    written_parts,
)
from fourbit.errors import DataError
from fourbit.limits import LimitError, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "fourbit-probe-of-the-closing"
#: Characters that a template may add to a conversation, and how often it may repeat it.
_LONGEST_FRAME, _LARGEST_RATIO = 1 << 20, 16


@dataclass(frozen=True, slots=True)
class Rendering:
    """A text, and the spans of its characters that the assistant wrote, each with its end of turn."""

    text: str
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class _Habits:
    """How a template writes a turn, learned from one whose answer is known.

    closing   what it writes after an answer; the first `kept` characters end the turn (0: nothing does)
    opened    a thinking block that the generation prompt begins and the written turn does not, or ""
    lead      what it writes between the generation prompt and an answer
    nests     whether a written turn begins with the generation prompt
    """

    closing: str
    kept: int
    opened: str
    lead: str
    nests: bool


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._learned: _Habits | None = None

    def text(
        self,
        messages: list[Message],
        where: str,
        *,
        answer_next: bool = False,
        tools: list[Any] | None = None,
    ) -> str:
        """The conversation as text; with `answer_next`, up to where the assistant would go on.

        Raises RowError beginning with `where` if the template refuses the conversation, and DataError if it
        runs away: it came with the model, and is a program.
        """
        given: dict[str, Any] = {} if tools is None else {"tools": tools}
        try:
            with limited():
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=answer_next, **given
                )
        except LimitError as error:
            raise DataError(
                f"{where}: the chat template of the model does not come to an end ({error}); "
                "use another model"
            ) from None
        except Exception as error:  # a template can raise every class there is
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise RowError(
                "refused", f"{where}: the chat template refuses the conversation ({reason}); change the row"
            ) from None
        assert isinstance(text, str)
        longest = _LONGEST_FRAME + _LARGEST_RATIO * len(repr((messages, tools)))
        if len(text) > longest:
            raise DataError(
                f"{where}: the chat template of the model writes {len(text):,} characters, too many for this "
                "conversation; use another model"
            )
        return text

    def whole(self, messages: list[Message], where: str, tools: list[Any] | None = None) -> Rendering:
        """The conversation as one text, all of it trained."""
        text = self.text(messages, where, tools=tools)
        self._check_tools(messages, where, text, tools)
        return Rendering(text, [(0, len(text))])

    def answers(
        self,
        messages: list[Message],
        where: str,
        *,
        tools: list[Any] | None = None,
        last_only: bool = False,
    ) -> list[Rendering]:
        """The texts that train the conversation's assistant turns, or its last one: one where prefixes nest.

        Raises RowError beginning with `where` if a turn cannot be written or its answer not be found.
        """
        whole = self.text(messages, where, tools=tools)
        self._check_tools(messages, where, whole, tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if turns[0] == 0:
            raise RowError(
                "refused",
                f"{where}: the conversation begins with the assistant, so there is nothing it answers; "
                "begin with a user turn",
            )
        self._habits(where)
        texts = [self._turn(messages, k, where, tools, whole) for k in (turns[-1:] if last_only else turns)]
        _check_written(messages, texts[-1].text, where)
        ends = [text.text[: text.spans[0][1]] for text in texts]
        if all(whole.startswith(end) for end in ends):
            return [Rendering(whole, [text.spans[0] for text in texts])]
        return texts

    def note(self, where: str) -> str:
        """What is made good in every conversation of this template, in one line; "" if nothing is."""
        habits = self._habits(where)
        notes = []
        if not habits.nests:
            prompt = f"the {habits.opened.strip()!r} of " if habits.opened else ""
            notes.append(f"answers follow {prompt}its generation prompt, which written turns do not have")
        if not habits.kept:
            notes.append(f"it ends no turn, so {self._tokenizer.eos_token!r} is added to each answer")
        return f"chat template: {'; '.join(notes)}" if notes else ""

    def _turn(
        self, messages: list[Message], index: int, where: str, tools: list[Any] | None, whole: str
    ) -> Rendering:
        """The text whose one answer is the assistant turn at `index`."""
        message, last = messages[index], index + 1 == len(messages)
        turn = f"{where}: message {index + 1}"
        before = self.text(messages[:index], where, answer_next=True, tools=tools)
        upto = whole if last else self.text(messages[: index + 1], where, tools=tools)
        start = len(before) if upto.startswith(before) else None
        if start is None:
            start = self._where_answer_begins(messages[:index], before, upto, turn, tools)
        end = self._end(upto, start, turn)
        answer, tail = upto[start:end], upto[end:]
        habits = self._habits(where)
        opened = habits.opened if not upto.startswith(before) and before.endswith(habits.opened) else ""
        answer = self._complete(message, answer, opened, turn)
        if not habits.kept and not self._closed(upto[:end], start):
            answer, tail = answer.rstrip() + self._eos(where), ""
        return Rendering(before + answer + tail, [(len(before), len(before) + len(answer))])

    def _where_answer_begins(
        self,
        earlier: list[Message],
        before: str,
        upto: str,
        turn: str,
        tools: list[Any] | None,
    ) -> int:
        """The place of the answer in a text that does not begin as the model sees it at inference.

        Either the two differ by the thinking block that the generation prompt opens, or the same turns with
        an answer that is known show where an answer stands.
        """
        habits = self._habits(turn)
        head = before.removesuffix(habits.opened)
        if upto.startswith(head):
            return len(head)
        known = self.text([*earlier, {"role": "assistant", "content": _PROBE}], turn, tools=tools)
        start = known.rfind(habits.lead + _PROBE)
        if start < 0 or known[:start] != upto[:start]:
            raise RowError(
                "refused",
                f"{turn}: the chat template begins this turn otherwise than its own "
                "generation prompt, so training would differ from inference; repair the template",
            )
        return start

    def _complete(self, message: Message, answer: str, opened: str, turn: str) -> str:
        """The answer with everything that the turn says, in the order in which the model writes it."""
        thought, said = split_thought(message)
        place = answer.rfind(said) if said else -1
        content = message.get("content") or ""
        if tag := open_thought(opened):
            answer = answer[place:] if place >= 0 else without_thought(answer)
            answer = f"{thought}\n</{tag}>\n\n{answer.lstrip()}"
        elif (
            said
            and thought
            and thought not in answer
            and thought in content
            and not message.get("tool_calls")
        ):
            answer = f"{content.strip()}{answer[place + len(said) :]}" if place >= 0 else answer
        missing = next((part for part in written_parts(message) if part not in answer), None)
        if missing is not None:
            short = missing if len(missing) <= 40 else f"{missing[:40]}..."
            raise RowError(
                "refused",
                f"{turn}: the chat template does not write {short!r} of this turn, so it would not be "
                "trained; put it into the content or use a model whose template writes it",
            )
        return answer

    def _end(self, upto: str, start: int, turn: str) -> int:
        """The end of the answer that begins at `start`, its end of turn included."""
        habits = self._habits(turn)
        if not habits.kept:
            closed = self._closed(upto, start)
            return closed or len(upto.rstrip())
        if upto.endswith(habits.closing) and len(upto) - len(habits.closing) >= start:
            return len(upto) - len(habits.closing) + habits.kept
        closed = self._closed(upto, start)
        if closed is None:
            raise RowError(
                "no_end_token",
                f"{turn}: the chat template does not end this turn with {habits.closing!r} as it "
                "ends others, so its end token cannot be found; change the message or the template",
            )
        return closed

    def _closed(self, upto: str, start: int) -> int | None:
        """The end of a special token after which nothing but white space stands, or None."""
        end = len(upto.rstrip())
        if any(upto.endswith(token, start, end) for token in self._special):
            return end
        return None

    def _habits(self, where: str) -> _Habits:
        if self._learned is None:
            asked: list[Message] = [{"role": "user", "content": "a"}]
            text = self.text([*asked, {"role": "assistant", "content": _PROBE}], where)
            found, _, closing = text.rpartition(_PROBE)
            if not found and not text.startswith(_PROBE):
                raise DataError(
                    f"{where}: the chat template does not write what the assistant says; repair the template"
                )
            before = self.text(asked, where, answer_next=True)
            opened = "" if text.startswith(before) else thought_at_end(before)
            head = before.removesuffix(opened)
            lead = found[len(head) :] if text.startswith(head) else ""
            kept = _end_of_turn(closing, self._special)
            self._learned = _Habits(closing, kept, opened, lead, text.startswith(before))
        return self._learned

    def _eos(self, where: str) -> str:
        if not self._tokenizer.eos_token:
            raise RowError(
                "no_end_token",
                f"{where}: the chat template writes nothing that ends an assistant turn and the tokenizer "
                "has no eos token, so the model would not learn to stop; set tokenizer.eos_token",
            )
        return str(self._tokenizer.eos_token)

    def _check_tools(self, messages: list[Message], where: str, text: str, tools: list[Any] | None) -> None:
        if tools and self.text(messages, where) == text:
            raise RowError(
                "refused",
                f"{where}: the chat template does not write the row's tools, so the model would not see "
                "them; drop the column or use a model whose template writes it",
            )


def _check_written(messages: list[Message], text: str, where: str) -> None:
    """What the model is asked must be in the text; some templates leave the system message out."""
    for number, message in enumerate(messages, start=1):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise RowError(
                "refused",
                f"{where}: message {number}: the chat template does not write this {message['role']} "
                "message, so the model would not see it; remove it or move it into a user turn",
            )


def _end_of_turn(closing: str, special: set[str]) -> int:
    """The length of `closing` up to the end of its first special tokens, or of its text if it has none."""
    found = [token for token in special if token in closing]
    if not found:
        return len(closing.rstrip())
    end = min(closing.index(token) for token in found)
    while following := max((t for t in found if closing.startswith(t, end)), key=len, default=""):
        end += len(following)
    return end
