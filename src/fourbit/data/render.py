"""One row to token ids and the mask of those that are trained.

    form, model               text                                   trained (loss: completions)
    messages                  the chat template                      assistant turns with their end token
    pair, chat template       user turn, assistant turn              the same
    pair, no chat template    lead + prompt + completion + eos       completion, eos
    document                  lead + text + eos, cut at max_length   all

`lead` is what the tokenizer itself puts before a text (bos, or nothing); chat templates write their own.
A token that holds any character of an answer is trained, so a prompt's last character that merges with
the answer's first is too. The mask is made here and never derived from token ids: an end-of-turn token is
trained also where it is the pad token. Position 0 is never trained, since nothing predicts it.

Without a chat template, spaces that end a prompt belong to the answer: most tokenizers write a space and
a word as one token, so after a prompt that ends in a space the model would stand inside a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fourbit.config import DataSettings
from fourbit.data.forms import Conversation, Document, Pair, form_of, interpret
from fourbit.data.row import Row, RowError
from fourbit.data.template import ChatTemplate, Rendering
from fourbit.data.tokens import Span, TextTokenizer, Tokens, end_id, leading_ids
from fourbit.data.turns import Message
from fourbit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Example:
    """What one forward pass sees of a row.

    input_ids      [T]
    trained        [T]  whether predicting this token is part of the loss; trained[0] is False
    row            index of this example among those encoded together
    source         "file:line"
    prompt_tokens  tokens before the first trained one
    """

    input_ids: list[int]
    trained: list[bool]
    row: int
    source: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row before it is tokenised.

    spans     characters that are trained
    framed    whether the tokenizer's leading tokens go before the text and eos after it
    document  whether the text may be cut into chunks
    """

    text: str
    spans: list[Span]
    framed: bool
    document: bool
    source: str
    form: str


class Renderer:
    """Rows to examples for one tokenizer and one set of data settings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self.tokenize = TextTokenizer(tokenizer)
        self._lead: list[int] | None = None

    def texts(self, row: Row) -> list[Rendered]:
        """A row's text and trained characters, or one text for each answer where the chat template needs it.

        Raises RowError, naming the row.
        """
        content = interpret(row, self.settings, chat=self.template is not None)
        form = form_of(row, self.settings)
        if self.template is None and self.settings.system is not None:
            raise DataError(
                "data.system needs a chat template and this model has none; put it into the prompts"
            )
        if isinstance(content, Document):
            renderings, framed = [Rendering(content.text, [(0, len(content.text))])], True
        elif self.template is not None:
            renderings, framed = self._conversation(content, row), False
        else:
            assert isinstance(content, Pair)
            text = content.prompt + content.completion
            start = 0 if self.settings.loss == "all" else len(before_answer(content))
            renderings, framed = [Rendering(text, [(start, len(text))])], True
        document = isinstance(content, Document)
        for rendering in renderings:
            _check_unicode(rendering.text, row)
        return [Rendered(r.text, r.spans, framed, document, row.source, form) for r in renderings]

    def text(self, row: Row) -> Rendered:
        """The text that ends with the row's last answer; most rows have only this one."""
        return self.texts(row)[-1]

    def _conversation(self, content: Conversation | Pair, row: Row) -> list[Rendering]:
        assert self.template is not None
        messages, tools = with_system(content, self.settings), tools_of(content)
        if self.settings.loss == "all":
            return [self.template.whole(messages, row.source, tools)]
        last_only = self.settings.loss == "last"
        return self.template.answers(messages, row.source, tools=tools, last_only=last_only)

    def examples(self, rendered: Rendered, tokens: Tokens) -> list[Example]:
        """The examples of one row: several chunks for a long document, else one of whatever length.

        Raises DataError if no token is trained.
        """
        ids, trained = tokens.ids, tokens.within(rendered.spans)
        if rendered.framed:
            lead = self.lead()
            ids, trained = [*lead, *ids, end_id(self.tokenizer)], [*([False] * len(lead)), *trained, True]
        trained = [False, *trained[1:]]
        if not any(trained):
            raise RowError(
                "no_trained_token",
                f"{rendered.source}: no token of the row is trained; give it an answer or remove it",
            )
        cuts = self._chunks(len(ids)) if rendered.document else [(0, len(ids))]
        return [_example(ids[a:b], [False, *trained[a + 1 : b]], rendered.source) for a, b in cuts]

    def _chunks(self, length: int) -> list[Span]:
        """Pieces of at most max_length tokens.

        Each begins with the last token of the one before, as its context, so that every token but the
        document's first is predicted once.
        """
        step = self.settings.max_length - 1
        return [(start, min(start + step + 1, length)) for start in range(0, length - 1, step)]

    def lead(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text."""
        if self._lead is None:
            self._lead = leading_ids(self.tokenizer)
        return self._lead


def render(row: Row, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> Example:
    """The ids and mask of one row; of a document longer than max_length, the first chunk.

    Of a conversation that needs a text for each answer, the last one.

    Other rows come back whole, however long: `encode` drops and counts those past max_length. Raises
    DataError, naming the row, if it cannot be rendered or has nothing to train on.
    """
    renderer = Renderer(tokenizer, settings)
    rendered = renderer.text(row)
    return renderer.examples(rendered, renderer.tokenize([rendered.text])[0])[0]


def with_system(content: Conversation | Pair, settings: DataSettings) -> list[Message]:
    """The turns of a conversation or pair, the settings' system message first unless the row has its own."""
    if isinstance(content, Pair):
        messages = [
            {"role": "user", "content": content.prompt},
            {"role": "assistant", "content": content.completion},
        ]
    else:
        messages = content.messages
    if settings.system is None or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": settings.system}, *messages]


def tools_of(content: Conversation | Pair) -> list[Any] | None:
    """The descriptions of functions that a conversation brings along."""
    return content.tools if isinstance(content, Conversation) else None


def before_answer(pair: Pair) -> str:
    """The prompt of a model without a chat template, without the spaces that its answer begins with."""
    return pair.prompt.rstrip(" ")


def _example(ids: list[int], trained: list[bool], source: str) -> Example:
    return Example(ids, trained, 0, source, trained.index(True))


def _check_unicode(text: str, row: Row) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise RowError(
            "refused", f"{row.source}: holds half of a character pair ({half}); repair the row"
        ) from None
