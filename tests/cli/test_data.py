"""`fourbit data` on a tiny model: report, rows, page, refusals."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

from rich.console import Console
from rich.style import Style

from fourbit.cli import data
from fourbit.cli.main import main
from tests.cli.conftest import Fourbit

SHOW = ["data", "--model", "model", "--data", "rows.jsonl"]


def test_rows_and_report(fourbit: Fourbit, here: Path) -> None:
    before = sorted(here.iterdir())
    code, out, err = fourbit(*SHOW, "--rows", "1", "--set", "data.heldout_fraction=0")
    assert (code, err) == (0, "")
    assert out.startswith(
        "rows.jsonl:1  32 tokens, 4 trained\n<|im_start|>user⏎\ncolor 0?<|im_end|>⏎\n<|im_start|>assistant⏎\n"
        "⟦red<|im_end|>⟧⏎\n"
    )
    assert "rows.jsonl:2" not in out
    assert "rows read   16 (prompt_completion)" in out
    filled = re.search(
        r"filled +(\S+)% end to end, (\S+)% padded, of the tokens computed", " ".join(out.split())
    )
    assert filled is not None
    assert 80 < float(filled[2]) < float(filled[1]) <= 100
    code, out, _ = fourbit(*SHOW, "--rows", "0", "--set", "train.packing=256")
    assert re.search(r"filled +9[89]\.\d% of the tokens computed in an epoch \(packs of up to 256\)", out)
    assert sorted(here.iterdir()) == before


def test_json_carries_no_text_of_rows(fourbit: Fourbit) -> None:
    code, out, _ = fourbit(*SHOW, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["rows"], report["train_rows"], report["heldout_rows"]) == (16, 15, 1)
    assert "color" not in out


def test_a_page_for_its_owner_only(fourbit: Fourbit, here: Path) -> None:
    (here / "page.html").write_text("old")
    (here / "page.html").chmod(0o644)
    code, out, _ = fourbit(*SHOW, "--html", "page.html", "--rows", "2")
    assert code == 0
    assert out.endswith("wrote page.html, which holds the text of 2 rows\n")
    assert "color" not in out
    assert stat.S_IMODE((here / "page.html").stat().st_mode) == 0o600
    page = (here / "page.html").read_text(encoding="utf-8")
    assert page.count("<section>") == 2
    assert page.startswith("<!doctype html>")


def test_refusals(fourbit: Fourbit, here: Path) -> None:
    assert fourbit(*SHOW, "--rows", "-1") == (2, "", "fourbit data: error: --rows -1: give 0 or more\n")
    assert fourbit(*SHOW, "--html", "no/page.html")[2] == (
        "fourbit data: error: no/page.html: cannot be written: No such file or directory\n"
    )
    with (here / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "color?", "completion": " "}\n')
    code, _, err = fourbit(*SHOW)
    assert code == 3
    assert err == (
        "fourbit data: error: rows.jsonl:17: 'completion' is empty, so there is nothing to train on; fill it "
        "or remove the row (`data.allow: [empty]` drops such rows)\n"
    )
    code, out, _ = fourbit(*SHOW, "--set", "data.allow=[empty]")
    assert code == 0
    assert "dropped     1 empty" in out


def test_training_stops_at_the_same_gate(fourbit: Fourbit, here: Path) -> None:
    (here / "rows.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n'
    )
    code, _, err = fourbit("train", "--model", "model", "--data", "rows.jsonl", "--output", "run")
    assert code == 3
    assert "rows.jsonl:2: 'completion' is empty" in err
    assert not (here / "run").exists()


def test_colors_say_what_is_trained_and_control_characters_are_shown(here: Path, monkeypatch) -> None:
    """In a terminal; a row must not be able to move its cursor."""
    row = {"prompt": "a\x1b[2Jb", "completion": "c\x07"}
    (here / "rows.jsonl").write_text(json.dumps(row) + "\n")
    screen = Console(force_terminal=True, color_system="truecolor", width=80, record=True, no_color=False)
    monkeypatch.setattr(data, "console", lambda json_output: screen)
    assert main([*SHOW, "--set", "data.heldout_fraction=0"]) == 0
    segments = [
        (segment.text, segment.style or Style())
        for segment in screen._record_buffer
        if not segment.is_control
    ]
    green = "".join(text for text, style in segments if style.bgcolor is not None)
    text = "".join(text for text, _ in segments)
    assert green == "c\\x07<|im_end|>"
    assert "a\\x1b[2Jb" in text
    assert "\x1b" not in text
