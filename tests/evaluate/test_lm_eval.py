from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourbit.config import DataSettings, EvalSettings
from fourbit.data.row import Row
from fourbit.errors import ConfigError
from fourbit.evaluate import lm_eval as module
from fourbit.evaluate.choice import evaluate_choice
from fourbit.evaluate.lm_eval import check_tasks, score_tasks
from fourbit.evaluate.questions import question_of
from tests.evaluate.conftest import build
from tests.tiny import byte_tokenizer

SETTINGS = EvalSettings(batch_size=4)


def questions(count: int) -> list[dict[str, Any]]:
    return [
        {
            "input": f"{'why ' * (n % 4)}{n * 7919}?\nA. {n}\nB. {n + 1}\nC. {n * n}\nD. none\nAnswer:",
            "output": "ABCD"[n % 4],
        }
        for n in range(count)
    ]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions(24)))
    file = tmp_path / "task.yaml"
    file.write_text(
        f"""\
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{input}}}}"
doc_to_choice: [A, B, C, D]
doc_to_target: output
metric_list: [{{metric: acc}}]
"""
    )
    return file


def test_it_agrees_with_our_multiple_choice(task: Path) -> None:
    model, tokenizer = build("llama"), byte_tokenizer()
    (score,) = score_tasks(model, tokenizer, [task], SETTINGS)
    data = DataSettings(train=("q",))
    asked = [question_of(Row(row, "q", n), data) for n, row in enumerate(questions(24), start=1)]
    ours = evaluate_choice(model, tokenizer, asked, SETTINGS)
    assert (score.task, score.metric, score.rows) == ("questions", "acc", 24)
    assert round(score.value * 24) == ours.accuracy.right
    assert 0 < ours.accuracy.right < 24
    assert score.stderr is not None
    (limited,) = score_tasks(model, tokenizer, [task], SETTINGS, limit=5)
    assert limited.rows == 5


def test_a_task_whose_data_is_missing(task: Path) -> None:
    task.write_text(task.read_text().replace("questions.jsonl", "none.jsonl"))
    with pytest.raises(ConfigError, match=r"task.yaml: lm-eval cannot load this task: .*none.jsonl"):
        score_tasks(build("llama"), byte_tokenizer(), [task], SETTINGS)


def test_what_is_checked_before_a_model_is_loaded(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    check_tasks([task])
    for wrong in (tmp_path / "none.yaml", tmp_path / "questions.jsonl", tmp_path):
        with pytest.raises(
            ConfigError, match=r"no such task file; give an lm-eval task as a local .yaml file"
        ):
            check_tasks([task, wrong])
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lm-eval-harness is not installed"):
        check_tasks([task])
