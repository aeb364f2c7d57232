"""The page of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourbit.cli.main import main
from fourbit.config_file import load_config
from fourbit.errors import ConfigError, DataError, ModelError, TrainingError
from fourbit.exporting import provenance
from fourbit.report.curves import read_curves
from fourbit.report.masks import masked_rows
from fourbit.report.run import write_report
from tests.pages import EVIL, Page
from tests.report.conftest import EVIL_SETTING, STEPS


def test_curves_are_read_with_what_is_not_finite_left_out(run_folder: Path) -> None:
    curves = read_curves(run_folder)
    assert (len(curves.train), len(curves.heldout), curves.steps, curves.not_finite) == (59, 6, STEPS, 1)
    assert curves.tokens_per_second == [(step, 200.0) for step in range(1, STEPS + 1)]
    assert curves.seconds == STEPS * 0.5 + 6 * 2.0


def test_the_page_holds_everything(evaluated: Path) -> None:
    source = provenance.Source("data", EVIL, "0" * 64)
    provenance.write(
        evaluated, [provenance.Step("train", (source,), {}, {"loss": 1.1}, EVIL, {"torch": "2"})]
    )
    (evaluated / "summary.json").write_text(
        json.dumps({"stopped": "done", "trainable_parameters": 5, "parameters": 50})
    )
    report = write_report(evaluated)
    html = report.path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.charts == 5
    for text in (
        "finished after 60 steps",
        "1.3231",
        "best held-out loss, step 60",
        "1.00 GB",
        "50.0% [25.0%, 75.0%]",
        "1. train",
        "clipped at 0.3",
        "100% of steps",
        "10.00%",
        report.findings[0].text,
        report.findings[1].text,
        EVIL,
        EVIL_SETTING,
    ):
        assert text in page.text, text
    assert [item.name for item in report.findings] == ["train on", "skipped"]


def test_row_text_is_shown_only_when_asked_for(evaluated: Path) -> None:
    without = write_report(evaluated).path.read_text(encoding="utf-8")
    assert EVIL not in Page(without).text
    assert "grün" not in without
    with_text = write_report(evaluated, with_text=True).path.read_text(encoding="utf-8")
    page = Page(with_text)
    assert page.text.count(EVIL) == 2 * 2 + 4  # prompt and answer of two samples; rows
    assert "grün & blau" in page.text.replace("\n", "")


def test_masks_are_those_of_training(run_folder: Path) -> None:
    rows = masked_rows(load_config(run_folder / "config.yaml"), 2)
    assert [row.source.rpartition(":")[2] for row in rows] == ["1", "2"]
    trained = "".join(text for text, is_trained in rows[1].tokens if is_trained)
    whole = "".join(text for text, _ in rows[1].tokens)
    assert trained == "grün & blau<|im_end|>"
    assert f"<|im_start|>user\n{EVIL} 1<|im_end|>\n<|im_start|>assistant\n{trained}" in whole
    assert "\ufffd" not in whole


def test_a_run_that_goes_on(run_folder: Path) -> None:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_folder / "metrics.jsonl").write_text("".join(lines[:9]))
    report = write_report(run_folder)
    assert [item.name for item in report.findings] == ["no held-out", "skipped"]
    assert "has not finished; it is at step 9." in report.path.read_text(encoding="utf-8")


def test_mistakes_are_one_line(tmp_path: Path, run_folder: Path, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report(tmp_path)
    (run_folder / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json: cannot be read"):
        write_report(run_folder)
    (run_folder / "evaluation.json").unlink()
    model_folder.rename(tmp_path / "moved")
    write_report(run_folder)
    with pytest.raises(ModelError, match="no such model folder"):
        write_report(run_folder, with_text=True)
    (run_folder / "metrics.jsonl").write_text("{}\n[1]\n")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl:2: not a line of metrics"):
        write_report(run_folder)
    (run_folder / "metrics.jsonl").unlink()
    with pytest.raises(TrainingError, match="cannot be read"):
        write_report(run_folder)


def test_the_command(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", str(run_folder), "--json", "--open"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["report"] == str(run_folder / "report.html")
    assert result["findings"][0]["name"] == "train on"
    assert opened == [(run_folder / "report.html").as_uri()]
    assert main(["report", str(run_folder)]) == 0
    assert "both still falling" in capsys.readouterr().out
    assert main(["report", str(run_folder / "none")]) == 2
