"""What a comparison came to, and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from fourbit.compare.arm import Outcome
from fourbit.compare.arms import Arm
from fourbit.compare.page import write_page
from fourbit.compare.result import Comparison, compare
from tests.compare.conftest import Make, finished
from tests.pages import EVIL, Page, write_lines

ROWS = {"train": 30, "heldout": 10, "score": 100}
SEEDS = (0, 1, 2)
LOSSES = {"a": (1.00, 1.02, 1.04), "b": (1.10, 1.13, 1.14), "c": (1.01, 1.00, 1.05)}
#: Rows 0 to n - 1 are right, so that of two arms only the better has rows of its own.
RIGHT = {"a": (80, 82, 81), "b": (60, 61, 62), "c": (79, 83, 80)}


def marks(count: int) -> list[bool]:
    return [row < count for row in range(100)]


def outcomes(*names: str, seeds: tuple[int, ...] = SEEDS) -> list[Outcome]:
    return [finished(LOSSES[name][seed], marks(RIGHT[name][seed])) for seed in seeds for name in names]


@pytest.fixture
def three(jobs: Make) -> Comparison:
    return compare(jobs("a", "b", "c", seeds=SEEDS), outcomes("a", "b", "c"), ROWS)


def test_means_and_intervals(three: Comparison) -> None:
    first = three.arms[0]
    assert first.loss is not None
    assert first.score is not None
    half = stats.t.ppf(0.975, 2) * 0.02 / 3**0.5
    assert (first.loss.value, first.loss.low, first.loss.high) == pytest.approx(
        (1.02, 1.02 - half, 1.02 + half)
    )
    wilson = stats.binomtest(81, 100).proportion_ci(method="wilson")
    assert (first.score.value, first.score.low, first.score.high) == pytest.approx((0.81, *wilson))
    assert (first.score.rows, first.tokens_per_second) == (100, 50.0)


def test_every_pair_is_tested_with_holm_over_pairs(three: Comparison) -> None:
    losses = [item for item in three.differences if item.figure == "held-out loss"]
    assert [(item.first, item.second) for item in losses] == [("a", "b"), ("a", "c"), ("b", "c")]
    raw = [stats.ttest_rel(LOSSES[item.first], LOSSES[item.second]).pvalue for item in losses]
    assert [item.p for item in losses] == pytest.approx(raw)
    assert [item.adjusted for item in losses] == pytest.approx(
        [3 * raw[0], raw[1], 2 * raw[2]] if raw[0] < raw[2] else [2 * raw[0], raw[1], 3 * raw[2]]
    )
    assert losses[0].difference == pytest.approx(-0.1033333)
    assert losses[0].relative == pytest.approx(1.02 / (3.37 / 3) - 1)
    assert [item.verdict for item in losses] == ["beyond noise", "within noise", "beyond noise"]


def test_scores_are_tested_over_rows_that_count_once(three: Comparison) -> None:
    scores = [item for item in three.differences if item.figure == "score"]
    assert [item.difference for item in scores] == pytest.approx([0.2, 1 / 300, -59 / 300])
    # Of a and b: rows 60 to 81 are right in more seeds of a, none in more of b.
    assert scores[0].p == pytest.approx(stats.binomtest(0, 22).pvalue)
    assert scores[0].detail == "22 rows against 0, of 100"
    assert scores[0].verdict == "beyond noise"
    assert scores[1].p == 1.0


def test_doubtful_is_between(three: Comparison) -> None:
    item = replace(three.differences[0], p=0.03, adjusted=0.09)
    assert item.verdict == "doubtful"
    assert replace(item, adjusted=0.04).verdict == "beyond noise"
    assert replace(item, p=0.06).verdict == "within noise"
    assert replace(item, p=None, adjusted=None).verdict == "not tested"


def test_one_seed_tests_scores_alone(jobs: Make) -> None:
    found = compare(jobs("a", "b", seeds=(0,)), outcomes("a", "b", seeds=(0,)), ROWS)
    assert [item.verdict for item in found.differences] == ["not tested", "beyond noise"]
    assert found.arms[0].loss is not None
    assert found.arms[0].loss.low is None
    assert "One seed" in found.notes[0]


def test_what_is_missing_is_left_out_and_told(jobs: Make) -> None:
    ended = outcomes("a", "b", "c")
    ended[1] = ended[4] = ended[7] = Outcome("no memory", "killed")
    ended[5] = Outcome("failed", "broke")
    found = compare(jobs("a", "b", "c", seeds=SEEDS), ended, ROWS)
    assert [(arm.status, arm.reason) for arm in found.arms] == [
        ("finished", ""),
        ("no memory", "killed"),
        ("partly", "broke"),
    ]
    assert found.arms[1].loss is None
    assert next((item.first, item.second, item.detail) for item in found.differences) == ("a", "c", "2 seeds")


def test_full_fine_tuning_with_the_adapters_learning_rate_is_told(jobs: Make) -> None:
    made = jobs("a", "full", seeds=(0,))
    made[1] = replace(made[1], config=made[1].config.model_copy(update={"lora": None}))
    notes = compare(made, outcomes("a", "b", seeds=(0,)), ROWS).notes
    assert "full trains all weights with the adapters' learning rate" in notes[0]


def test_the_page(tmp_path: Path, jobs: Make) -> None:
    made = [
        replace(job, arm=Arm(EVIL, (EVIL,)) if job.arm.name == "c" else job.arm)
        for job in jobs("a", "b", "c", "d", seeds=SEEDS)
    ]
    ended = []
    for job in made:
        name = "c" if job.arm.name == EVIL else job.arm.name
        if name == "d":
            ended.append(Outcome("no memory", EVIL))
            continue
        ended.append(finished(LOSSES[name][job.seed], marks(RIGHT[name][job.seed])))
        job.folder.mkdir(parents=True)
        write_lines(
            job.folder / "metrics.jsonl", [{"step": step, "heldout_loss": 2 / step} for step in (1, 2)]
        )
        write_lines(job.folder / "timing.jsonl", [{"step": 1, "heldout_seconds": 1.0}])
    comparison = compare(made, ended, ROWS)
    html = write_page(tmp_path, comparison, made, EVIL).read_text(encoding="utf-8")
    page = Page(html)
    assert page.charts == 5
    for text in (
        "1.0200",
        "[0.9703, 1.0697]",
        "81.0%",
        "did not fit",
        "beyond noise",
        "paired t over seeds",
        EVIL,
    ):
        assert text in page.text, text
    assert json.loads(json.dumps(comparison.to_dict()))["differences"][0]["verdict"] == "beyond noise"
