"""What a row means by its columns and the settings, and what is said of those that mean nothing."""
# ruff: noqa: E501 - messages stand on one line, as they are printed

from __future__ import annotations

import pytest

from fourbit.data.forms import Conversation, Document, Pair, form_of, interpret
from fourbit.errors import DataError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"messages": CHAT}, "messages"),
        ({"conversations": CHAT, "id": 1}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "messages": CHAT}, "messages"),
        ({"instruction": "a", "input": "", "output": "b", "text": "ab"}, "instruction"),
        ({"instruction": "a", "output": "b"}, "instruction"),
        ({"text": "a", "meta": "b"}, "text"),
    ],
)
def test_the_form_follows_from_the_columns(fields, form, row, settings):
    assert form_of(row(**fields), settings()) == form


def test_the_settings_override_the_columns(row, settings):
    both = row(messages=CHAT, text="a", prompt="p", completion="c")
    assert form_of(both, settings(format="text")) == "text"
    assert interpret(both, settings(format="prompt_completion"), chat=True) == Pair("p", "c")
    templates = settings(prompt="<{text}>", completion="{{{prompt}}}")
    assert interpret(both, templates, chat=True) == Pair("<a>", "{p}")


def test_columns_through_templates(row, settings):
    item = row(text="x\ny", label=3, **{"two words": "é"})
    templates = settings(prompt="Q: {text} {two words}\nA:", completion=" {label}")
    assert form_of(item, templates) == "prompt_completion"
    assert interpret(item, templates, chat=False) == Pair("Q: x\ny é\nA:", " 3")


def test_documents(row, settings):
    assert interpret(row(text=" a\n"), settings(), chat=True) == Document(" a\n")


def test_messages_pass_whole_without_their_nulls(row, settings):
    messages = [
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": "b", "reasoning": "c"},
    ]
    assert interpret(row(messages=messages), settings(), chat=True) == Conversation(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]
    )


def test_sharegpt_turns(row, settings):
    turns = [("system", "s"), ("human", "a"), ("gpt", "b")]
    item = row(conversations=[{"from": role, "value": value} for role, value in turns])
    assert interpret(item, settings(), chat=True) == Conversation(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    )


NAMES = "name them messages, prompt and completion, instruction and output, question and answer, or text, or set data.prompt and data.completion"
LIST = "must be a list of objects with role and content"

REFUSED = [
    ({"topic": "a", "answer": "b"}, {}, f"cannot tell what to train on from the columns topic, answer; {NAMES}"),
    (
        {"promt": "a", "completion": "b"},
        {},
        f"cannot tell what to train on from the columns promt, completion; {NAMES}",
    ),
    (
        {"prompt": "a", "answer": "b"},
        {"format": "prompt_completion"},
        "format prompt_completion needs the column 'completion' or 'response', but the row has prompt, answer",
    ),
    (
        {"prompt": "a", "completions": "b"},
        {"format": "prompt_completion"},
        "format prompt_completion needs the column 'completion' or 'response' (did you mean 'completions'?), but the row has prompt, completions",
    ),
    (
        {"mesages": CHAT},
        {"format": "messages"},
        "format messages needs the column 'messages' or 'conversations' (did you mean 'mesages'?), but the row has mesages",
    ),
    (
        {"text": "a", "category": "b"},
        {"prompt": "{text}", "completion": "{categry}"},
        "data.completion uses the column 'categry' (did you mean 'category'?), but the row has text, category",
    ),
    (
        {"text": "a", "label": None},
        {"prompt": "{text}", "completion": "{label}"},
        "'label' is null, must be text or a number",
    ),
    ({"text": "a", "x": ""}, {"prompt": "{text}", "completion": "{x}"}, "the completion is empty, so there is nothing to train on; fill it or remove the row"),
    ({"prompt": "a", "completion": " "}, {}, "'completion' is empty, so there is nothing to train on; fill it or remove the row"),
    ({"instruction": "a", "output": ""}, {}, "'output' is empty, so there is nothing to train on; fill it or remove the row"),
    ({"prompt": "a", "completion": 5}, {}, "'completion' is a number (5), must be text"),
    ({"prompt": ["a"], "completion": "b"}, {}, "'prompt' is a list, must be text"),
    ({"instruction": "a", "input": {}, "output": "b"}, {}, "'input' is an object, must be text"),
    ({"text": True}, {}, "'text' is true or false, must be text"),
    ({"text": "\n"}, {}, "'text' is empty; remove the row"),
    ({"messages": "hello"}, {}, f"'messages' is text, {LIST}"),
    ({"messages": None}, {}, f"'messages' is null, {LIST}"),
    ({"conversations": {"role": []}}, {}, f"'conversations' is an object, {LIST}"),
    ({"messages": ["a"]}, {}, "message 1 is text, must be an object with role and content"),
    ({"messages": [CHAT[0], {"content": "b"}]}, {}, "message 2 has no role; each message needs role and content"),
    ({"messages": [{"role": "user"}]}, {}, "message 1 has no content; each message needs role and content"),
    ({"messages": [{"role": 1, "content": "a"}]}, {}, "message 1: role is a number (1), must be text"),
    ({"conversations": [{"from": 1, "value": "a"}]}, {}, "message 1: role is a number (1), must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {}, "message 1: content holds a part that is not text (text); remove it"),
    ({"messages": [*CHAT, {"role": "assistant", "content": " "}]}, {}, "message 3: the assistant's content is empty; fill it or remove the row"),
    ({"messages": []}, {}, "the conversation has no assistant turn, so there is nothing to train on; add one or remove the row"),
    ({"messages": CHAT[:1]}, {}, "the conversation has no assistant turn, so there is nothing to train on; add one or remove the row"),
    ({"messages": [*CHAT, CHAT[0]]}, {}, "the conversation ends with a user turn, must end with the assistant's; cut it after the last answer"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "changes", "message"), REFUSED, ids=range(len(REFUSED)))
def test_rows_that_mean_nothing(fields, changes, message, row, settings):
    with pytest.raises(DataError) as error:
        interpret(row(12, **fields), settings(**changes), chat=True)
    assert str(error.value) == f"f.jsonl:12: {message}"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "{text",
            "data.prompt '{text': expected '}' before end of string; write columns as {name} and braces as {{ }}",
        ),
        ("{text!r}", "data.prompt '{text!r}': 'text' carries a format; write columns as {name} alone"),
        ("{text:>9}", "data.prompt '{text:>9}': 'text' carries a format; write columns as {name} alone"),
        ("{}", "f.jsonl:1: data.prompt uses the column '', but the row has text"),
        (
            "{text.x}",
            "f.jsonl:1: data.prompt uses the column 'text.x' (did you mean 'text'?), but the row has text",
        ),
    ],
)
def test_templates_that_cannot_be_filled(prompt, message, row, settings):
    with pytest.raises(DataError) as error:
        form_of(row(text="a"), settings(prompt=prompt, completion="{text}"))
    assert str(error.value) == message


def test_templates_contradict_another_format(row, settings):
    with pytest.raises(DataError) as error:
        form_of(row(text="a"), settings(prompt="{text}", completion="{text}", format="text"))
    assert str(error.value) == (
        "data.format is text, but data.prompt and data.completion make prompt_completion; drop the templates or the format"
    )


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"question": "a", "answer": "b"}, "question_answer"),
        ({"query": "a", "response": "b"}, "question_answer"),
        ({"prompt": "a", "response": "b"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "response": "b"}, "instruction"),
    ],
)
def test_other_names_of_the_same_columns(fields, form, row, settings):
    item = row(**fields)
    assert form_of(item, settings()) == form
    pair = interpret(item, settings(), chat=True)
    assert (pair.prompt, pair.completion) == ("a", "b")
    assert interpret(item, settings(format=form), chat=True) == pair


def test_preference_pairs_are_refused_with_the_reason(row, settings):
    with pytest.raises(DataError) as error:
        form_of(row(prompt="a", chosen="b", rejected="c"), settings())
    assert str(error.value) == (
        "f.jsonl:1: the columns chosen and rejected are preference pairs, for methods that compare two answers; to "
        "train on the better one, give it as completion, or a conversation as messages"
    )
    assert form_of(
        row(prompt="a", chosen="b", rejected="c"), settings(prompt="{prompt}", completion="{chosen}")
    )
