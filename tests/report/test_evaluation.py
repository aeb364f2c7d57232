"""The scores of a run as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fourbit.evaluate.kept import keep
from fourbit.report.evaluation import evaluation_table

EXACT = {"value": 0.5, "low": 0.25, "high": 0.75}
RESULT = {
    "rows": 4,
    "metrics": {"exact_match": EXACT, "token_f1": {**EXACT, "value": 0.625}},
    "accuracy": {**EXACT, "right": 2, "count": 4},
    "choice_accuracy": {**EXACT, "right": 2, "count": 4},
    "loss": 1.25,
    "perplexity": None,
    "cut_answers": 0,
}
DIFFERENCE = {
    "exact_match": {"value": 0.25, "low": -0.125, "high": 0.5, "p": 0.25, "method": "newcombe"},
    "likeliest_label": {"value": 0.5, "low": 0.25, "high": 0.75, "p": 1e-6, "method": "newcombe"},
    "loss": {"value": -0.5, "low": -0.75, "high": -0.25, "p": None, "method": "bootstrap"},
}


def kept(folder: Path, found: dict[str, Any], data: list[str], settings: list[str]) -> dict[str, Any]:
    """What `keep` writes, as it is read back."""
    return dict(json.loads(keep(folder, found, data, settings).read_text(encoding="utf-8")))


def test_base_adapter_and_difference(tmp_path: Path) -> None:
    found = {"base": RESULT, "adapter": RESULT, "difference": DIFFERENCE}
    table = evaluation_table(kept(tmp_path, found, ["a.csv", "b.csv"], ["eval.batch_size=1"]))
    assert table.rows == "a.csv, b.csv, with eval.batch_size=1"
    assert table.columns == ["base", "adapter", "difference"]
    both = {"base": "50.0% [25.0%, 75.0%]", "adapter": "50.0% [25.0%, 75.0%]"}
    loss = {"base": "1.25", "adapter": "1.25", "difference": "-0.5000 [-0.7500, -0.2500]"}
    assert table.figures == {
        "exact match": {**both, "difference": "+25.0 [-12.5, +50.0], p = 0.250"},
        "token f1": {"base": "62.5% [25.0%, 75.0%]", "adapter": "62.5% [25.0%, 75.0%]"},
        "likeliest label": {**both, "difference": "+50.0 [+25.0, +75.0], p < 0.001"},
        "rows": {"base": "4", "adapter": "4"},
        "loss per token": loss,
        "cut answers": {"base": "0", "adapter": "0"},
    }


def test_tasks_of_the_harness_and_the_runs_own_rows(tmp_path: Path) -> None:
    tasks = [
        {"task": "a", "metric": "acc", "value": 0.5, "stderr": 0.1, "rows": 9},
        {"task": "b", "metric": "ppl", "value": 12.5, "stderr": None, "rows": 9},
    ]
    table = evaluation_table(kept(tmp_path, {"adapter": {"tasks": tasks}}, [], []))
    assert table.rows == "the rows that the run held out"
    assert table.figures == {"a, acc": {"adapter": "0.5 +- 0.196"}, "b, ppl": {"adapter": "12.5"}}


def test_what_is_no_figure_is_left_out() -> None:
    strange = {
        "base": {"metrics": [1], "loss": True, "accuracy": {"value": "x"}, "tasks": [1, {}]},
        "data": 3,
    }
    assert evaluation_table(strange).figures == {}
    assert evaluation_table({}).figures == {}
