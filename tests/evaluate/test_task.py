from __future__ import annotations

import json

import pytest
from transformers import LlamaForCausalLM

from fourbit.config import DataSettings, EvalSettings
from fourbit.data.row import Row
from fourbit.errors import DataError
from fourbit.evaluate.scores import Confusion
from fourbit.evaluate.task import evaluate
from tests.evaluate.conftest import COLORS
from tests.tiny import byte_tokenizer

DATA, SETTINGS = DataSettings(train=("colors.jsonl",)), EvalSettings(max_new_tokens=8)


def changed(rows: list[Row], line: int, completion: str) -> list[Row]:
    """The rows with another reference answer in one line, so that the model is wrong there."""
    return [
        Row({**row.fields, "completion": completion}, row.file, row.line) if row.line == line else row
        for row in rows
    ]


def test_what_was_learned_is_right(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    labels = sorted(COLORS.values())
    result = evaluate(learned, byte_tokenizer(), rows, DATA, SETTINGS, labels=labels, samples=2)
    assert result.right == [True] * 4
    assert result.choices == [labels.index(color) for color in COLORS.values()]
    assert result.accuracy is not None
    assert result.choice_accuracy is not None
    assert (result.accuracy.right, result.choice_accuracy.right) == (4, 4)
    assert result.loss is not None
    assert result.loss.loss < 0.1
    assert result.loss.tokens == sum(len(color) + 1 for color in COLORS.values())
    assert [(s.prompt, s.reference, s.answer, s.choice) for s in result.samples] == [
        ("grass?", "green", "green", "green"),
        ("snow?", "white", "white", "white"),
    ]
    assert result.confusions == []
    assert json.loads(json.dumps(result.to_dict()))["accuracy"]["right"] == 4


@pytest.mark.parametrize("complete", [True, False])
def test_wrong_answers(learned: LlamaForCausalLM, rows: list[Row], complete: bool) -> None:
    wrong = changed(changed(rows, 2, "black"), 3, "wh")
    result = evaluate(
        learned, byte_tokenizer(), wrong, DATA, SETTINGS, loss=False, samples=2, complete=complete
    )
    assert result.right == [True, False, False, True]
    assert result.loss is None
    assert result.samples[1].answer == "white"  # complete whether or not the others are
    expected = [Confusion("black", "blue", 1), Confusion("wh", "white", 1)]
    assert result.confusions == (expected if complete else [])


def test_breaking_off_saves_tokens(
    learned: LlamaForCausalLM, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourbit.evaluate.context import Context

    steps: list[int] = []
    extend = Context.extend
    monkeypatch.setattr(
        Context, "extend", lambda self, ids, *a, **k: steps.append(0) or extend(self, ids, *a, **k)
    )
    wrong = [Row({**row.fields, "completion": "zzz"}, row.file, row.line) for row in rows]
    evaluate(learned, byte_tokenizer(), wrong, DATA, SETTINGS, loss=False, samples=0)
    whole = len(steps)
    evaluate(learned, byte_tokenizer(), wrong, DATA, SETTINGS, loss=False, samples=0, complete=False)
    assert len(steps) - whole == 1  # the prompts; no token after the first
    assert whole > 5


def test_an_answer_cut_off_is_wrong_and_counted(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    short = EvalSettings(max_new_tokens=3)
    result = evaluate(learned, byte_tokenizer(), changed(rows, 4, "re"), DATA, short, loss=False)
    assert result.right == [False] * 4
    assert result.cut == 4
    exact = evaluate(learned, byte_tokenizer(), rows, DATA, EvalSettings(max_new_tokens=3), loss=False)
    assert exact.right == [False] * 4  # "red" is all there, but nothing says that it ends


def test_case(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    upper = changed(rows, 1, "GREEN")
    assert evaluate(learned, byte_tokenizer(), upper, DATA, SETTINGS, loss=False).right == [
        False,
        True,
        True,
        True,
    ]
    folded = evaluate(
        learned, byte_tokenizer(), upper, DATA, SETTINGS, loss=False, casefold=True, complete=False
    )
    assert folded.right == [True] * 4


def test_progress(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(
        learned,
        byte_tokenizer(),
        rows,
        DATA,
        SETTINGS,
        labels=["red", "blue"],
        progress=lambda *at: seen.append(at),
    )
    assert seen[-1] == ("loss", 4, 4)
    done = [number for stage, number, _ in seen if stage == "answers"]
    assert done == sorted(done)
    assert done[-1] == 4


def test_plain_text_has_a_loss_only(learned: LlamaForCausalLM) -> None:
    rows = [Row({"text": "grass is green"}, "t.txt", 1)]
    result = evaluate(learned, byte_tokenizer(), rows, DATA, SETTINGS)
    assert (result.accuracy, result.right, result.samples) == (None, None, [])
    assert result.loss is not None
    with pytest.raises(DataError, match=r"t.txt:1: plain text has no answers to score"):
        evaluate(learned, byte_tokenizer(), rows, DATA, SETTINGS, loss=False)


def test_no_rows(learned: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="no rows to evaluate on"):
        evaluate(learned, byte_tokenizer(), [], DATA, SETTINGS)
