from __future__ import annotations

import json

import pytest
from transformers import LlamaForCausalLM

from fourbit.config import DataSettings, EvalSettings
from fourbit.data.row import Row
from fourbit.errors import ConfigError, DataError
from fourbit.evaluate.result import differences
from fourbit.evaluate.scores import Confusion
from fourbit.evaluate.task import evaluate
from tests.evaluate.conftest import COLORS, build
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


def test_the_same_accuracies_without_the_rest_of_the_search(
    learned: LlamaForCausalLM, rows: list[Row]
) -> None:
    """A wrong row's likeliest label stays unknown, but for samples and references that are no labels."""
    wrong = changed(changed(rows, 1, "black"), 2, "red") * 2
    labels = sorted(COLORS.values())
    arguments = (learned, byte_tokenizer(), wrong, DATA, SETTINGS)
    whole = evaluate(*arguments, labels=labels, loss=False, samples=1)
    fast = evaluate(*arguments, labels=labels, loss=False, samples=1, complete=False)
    assert fast.choice_accuracy == whole.choice_accuracy
    assert [row.choice_right for row in fast.row_scores] == [row.choice_right for row in whole.row_scores]
    assert [row.choice for row in whole.row_scores] == ["green", "blue", "white", "red"] * 2
    assert [row.choice for row in fast.row_scores] == ["green", None, "white", "red"] * 2
    assert (fast.confusions, fast.table, fast.samples[0].choice) == ([], None, "green")
    assert [row.to_dict(False)["likeliest_label"] for row in fast.row_scores] == [
        False,
        False,
        True,
        True,
    ] * 2


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


def test_metrics_of_answers_that_go_on(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    wanted = changed(changed(rows, 1, "ee"), 2, "the blue")
    settings = EvalSettings(max_new_tokens=8, metrics=("rouge_l", "contains", "token_f1"))
    result = evaluate(learned, byte_tokenizer(), wanted, DATA, settings, loss=False)
    assert list(result.metrics) == ["rouge_l", "contains", "token_f1"]
    assert result.right == [True, False, True, True]  # by contains: rouge_l knows no right and wrong
    assert result.accuracy is not None
    assert result.accuracy.right == 3
    assert [row.scores for row in result.row_scores[:2]] == [
        {"rouge_l": 0.0, "contains": 1.0, "token_f1": 0.0},
        {"rouge_l": pytest.approx(2 / 3), "contains": 0.0, "token_f1": 1.0},
    ]
    assert result.metrics["rouge_l"].value == pytest.approx((0 + 2 / 3 + 1 + 1) / 4)
    assert result.metrics["contains"].method == "wilson"
    graded = EvalSettings(max_new_tokens=8, metrics=("rouge_l",))
    only = evaluate(learned, byte_tokenizer(), wanted, DATA, graded, loss=False)
    assert (only.right, only.accuracy, only.samples[0].right) == (None, None, None)


def test_an_answer_cut_off_by_metric(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    """`red` is all there after three tokens, but nothing says that it ends."""
    settings = EvalSettings(max_new_tokens=3, metrics=("contains", "exact_match"))
    result = evaluate(learned, byte_tokenizer(), rows, DATA, settings, loss=False)
    assert result.row_scores[3].scores == {"contains": 1.0, "exact_match": 0.0}
    assert [row.cut for row in result.row_scores] == [True] * 4
    repeated = [Row(row.fields, "twice.jsonl", row.line) for row in [*rows, *rows]]
    short = EvalSettings(max_new_tokens=3)
    table = evaluate(learned, byte_tokenizer(), repeated, DATA, short, loss=False).table
    assert table is not None
    assert [counts[-1] for counts in table.counts] == [2] * 4


def test_a_reference_that_a_metric_cannot_use(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    settings = EvalSettings(metrics=("number",))
    with pytest.raises(DataError, match=r"colors.jsonl:1: the metric number needs a number"):
        evaluate(learned, byte_tokenizer(), rows, DATA, settings)


def test_breaking_off_needs_exact_match(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    settings = EvalSettings(metrics=("exact_match", "contains"))
    with pytest.raises(
        ConfigError, match="cannot be broken off early where exact_match, contains score them"
    ):
        evaluate(learned, byte_tokenizer(), rows, DATA, settings, complete=False)


def test_losses_of_rows(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    """A row too long is left out and counted; the others keep their places, the same row twice too."""
    long = Row({"prompt": "x" * 200, "completion": "green"}, "colors.jsonl", 9)
    short = DATA.model_copy(update={"max_length": 100})
    mixed = [rows[0], long, rows[1], rows[0]]
    result = evaluate(learned, byte_tokenizer(), mixed, short, SETTINGS)
    assert result.loss is not None
    losses = [row.loss for row in result.row_scores]
    assert result.dropped == 1
    assert losses[1] is None
    assert losses[0] == pytest.approx(losses[3])
    assert [row.tokens for row in result.row_scores] == [6, 0, 5, 6]
    assert sum(loss or 0 for loss in losses) / 17 == pytest.approx(result.loss.loss)


def test_chunks_of_a_document_are_one_row(learned: LlamaForCausalLM) -> None:
    rows = [Row({"text": "grass is green " * 9}, "t.txt", 1), Row({"text": "sky"}, "u.txt", 1)]
    result = evaluate(learned, byte_tokenizer(), rows, DATA.model_copy(update={"max_length": 50}), SETTINGS)
    assert [row.tokens for row in result.row_scores] == [15 * 9, 3]


def test_differences(learned: LlamaForCausalLM, rows: list[Row]) -> None:
    tokenizer, labels = byte_tokenizer(), sorted(COLORS.values())
    settings = EvalSettings(max_new_tokens=8, metrics=("exact_match", "rouge_l"))
    good = evaluate(learned, tokenizer, rows * 3, DATA, settings, labels=labels)
    bad = evaluate(build("llama"), tokenizer, rows * 3, DATA, settings, labels=labels)
    found = differences(bad, good)
    assert list(found) == ["exact_match", "rouge_l", "likeliest_label", "loss"]
    assert found["exact_match"].value == 1.0
    assert found["exact_match"].p == pytest.approx(2 / 2**12)
    assert found["rouge_l"].value == 1.0
    assert found["loss"].value == pytest.approx(good.loss.loss - bad.loss.loss)  # type: ignore[union-attr]
    assert all(difference.clear for difference in found.values())
    same = differences(good, good)
    assert all(difference.value == 0 and not difference.clear for difference in same.values())
    assert same["exact_match"].p == 1.0


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
