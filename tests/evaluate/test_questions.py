from __future__ import annotations

from typing import Any

import pytest

from fourbit.config import DataSettings
from fourbit.data.row import Row
from fourbit.errors import DataError
from fourbit.evaluate.questions import Question, prompt_texts, question_of

DATA = DataSettings(train=("q.jsonl",))
ASKED = {"question": "How many? ", "choices": ["one", "two", "three"], "answer": 1}


def ask(settings: DataSettings = DATA, **fields: Any) -> Question:
    return question_of(Row(fields, "q.jsonl", 7), settings)


@pytest.mark.parametrize(
    "fields",
    [
        ASKED,
        {**ASKED, "answer": "B"},
        {**ASKED, "answer": "two"},
        {**ASKED, "answer": "1"},
        {"question": "How many?", "options": {"A": "one", "B": "two", "C": "three"}, "answer": "B"},
        {"question": "How many?", "A": "one", "B": "two", "C": "three", "answer": "B"},
    ],
)
def test_forms(fields: dict[str, Any]) -> None:
    found = ask(**fields)
    assert found.text == "How many?\nA. one\nB. two\nC. three\nAnswer:"
    assert (found.letters, found.answer, found.source) == (("A", "B", "C"), 1, "q.jsonl:7")
    assert not found.finished


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"input": "A. x\nI. mean\nA. one\nB. two\nAnswer:", "output": " B"}, DATA),
        ({"prompt": "A. x\nI. mean\nA. one\nB. two\nAnswer:", "completion": "B"}, DATA),
        (
            {"question": "I. mean", "a": "one", "b": "two", "gold": "B"},
            DATA.model_copy(
                update={
                    "prompt": "A. x\n{question}\nA. {a}\nB. {b}\nAnswer:",
                    "completion": "{gold}",
                }
            ),
        ),
    ],
)
def test_finished_texts(fields: dict[str, Any], settings: DataSettings) -> None:
    found = ask(settings, **fields)
    assert found.text == "A. x\nI. mean\nA. one\nB. two\nAnswer:"
    assert (found.letters, found.answer, found.finished) == (("A", "B"), 1, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**ASKED, "answer": 3}, "the answer 3 is none of the options"),
        ({**ASKED, "answer": "D"}, "the answer 'D' is none of the options"),
        ({**ASKED, "answer": True}, "'answer' is true or false, must be text"),
        ({**ASKED, "choices": ["2", "1", "3"], "answer": "1"}, None),
        ({**ASKED, "choices": ["0", "2", "1"], "answer": "1"}, "the answer '1' could mean several options"),
        ({**ASKED, "choices": ["B", "A"], "answer": "A"}, "the answer 'A' could mean several options"),
        ({**ASKED, "choices": ["x", "x"], "answer": "x"}, "the answer 'x' could mean several options"),
        ({**ASKED, "choices": "one, two"}, "'choices' is text, must be a list of 2 to 26 options"),
        ({**ASKED, "choices": ["one"]}, "'choices' is a list, must be a list of 2 to 26"),
        ({**ASKED, "choices": ["one", None]}, "'choices': an option is null"),
        ({"question": "q", "answer": "A"}, "needs the column 'choices' or 'options', or columns A, B, C"),
        ({"question": "q", "B": "x", "C": "y", "answer": "B"}, "needs the column 'choices'"),
        ({"question": "q", "choices": ["a", "b"]}, "no column 'answer'"),
        ({**ASKED, "question": " "}, "'question' is empty, must be text"),
        ({"input": "A. x\nB. y\nAnswer:", "output": "C"}, "is 'C', must be one of the letters A, B"),
        ({"input": "Which?", "output": "A"}, "the prompt lists no options as lines"),
        ({"text": "A. x\nB. y"}, "multiple choice needs the columns question, choices and answer"),
        ({"a": "b"}, "cannot tell what to train on"),
    ],
)
def test_mistakes(fields: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert ask(**fields).answer == 1  # place and text agree
        return
    with pytest.raises(DataError) as caught:
        ask(**fields)
    assert message in str(caught.value)
    assert str(caught.value).startswith("q.jsonl:7: ")


def question(subject: str | None, text: str, answer: int) -> Question:
    return Question("q.jsonl:1", subject, f"{text}\nA. x\nB. y\nAnswer:", ("A", "B"), answer, finished=False)


def test_prompts_with_examples() -> None:
    examples = [
        question("us_history", "first", 0),
        question("anatomy", "other", 1),
        question("us_history", "second", 1),
        question("us_history", "third", 1),
    ]
    (text,) = prompt_texts([question("us_history", "asked", 0)], examples, 2)
    assert text == (
        "The following are multiple choice questions (with answers) about us history.\n\n"
        "first\nA. x\nB. y\nAnswer: A\n\n"
        "second\nA. x\nB. y\nAnswer: B\n\n"
        "asked\nA. x\nB. y\nAnswer:"
    )
    (plain,) = prompt_texts([question(None, "asked", 0)], examples, 1)
    assert plain.startswith(
        "The following are multiple choice questions (with answers).\n\nfirst\nA. x\nB. y\nAnswer: A\n\nasked"
    )


def test_examples_that_do_not_do() -> None:
    with pytest.raises(DataError, match=r"eval.shots is 2, but eval.shots_file has 1 examples of anatomy"):
        prompt_texts([question("anatomy", "asked", 0)], [question("anatomy", "one", 0)], 2)
    finished = Question("q.jsonl:4", None, "A. x\nB. y\n", ("A", "B"), 0, finished=True)
    assert prompt_texts([finished], [], 0) == ["A. x\nB. y\n"]
    with pytest.raises(DataError, match=r"q.jsonl:4: worked examples need questions with a column"):
        prompt_texts([finished], [question(None, "one", 0)], 1)
