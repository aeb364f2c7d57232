"""The documents say what is there: files, commands, names, defaults, and the figures of the script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fourbit
from fourbit.cli.main import COMMANDS
from fourbit.config import LoraSettings, TrainSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", [README, METHOD], ids=["README", "method"])
def test_named_files_exist(text: str) -> None:
    named = set(re.findall(r"(?:src|csrc|tests|demo|recipes|docs|benchmarks|requirements)/[\w./*-]*\w", text))
    assert len(named) > 5
    assert [path for path in sorted(named) if not list(ROOT.glob(path))] == []


def test_reliability_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    missing = [(file, name) for file, name in named if f"def {name}(" not in (ROOT / file).read_text("utf-8")]
    assert missing == []


def test_readme_names_every_command() -> None:
    assert set(re.findall(r"^\| `fourbit (\w+)", README, re.MULTILINE)) == set(COMMANDS)


def test_readme_uses_names_that_exist() -> None:
    used = set(re.findall(r"fourbit\.(\w+)\(", README))
    assert used >= {"load", "add_lora", "train", "save_quantized"}
    assert used <= set(fourbit.__all__)
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")


def test_readme_gives_the_defaults() -> None:
    lora, train = LoraSettings(), TrainSettings()
    rows = {
        cells[1].strip(): cells[2].strip() for line in README.splitlines() if (cells := line.split("|"))[3:]
    }
    assert rows["`lora.r`, `lora.alpha`"] == f"{lora.r}, {lora.alpha:g}"
    assert rows["`lora.dropout`"] == str(lora.dropout)
    assert rows["`lora.target_modules`"] == lora.target_modules
    assert rows["`train.schedule`, `warmup_ratio`"] == f"{train.schedule}, {train.warmup_ratio}"
    assert rows["`train.effective_batch`"] == str(train.effective_batch)
    assert rows["`train.micro_batch`"] == str(train.micro_batch)
    clipping = f"{train.max_grad_norm}, {train.beta1}, {train.beta2}"
    assert rows["`train.max_grad_norm`, `beta1`, `beta2`"] == clipping


@pytest.mark.slow
def test_the_script_prints_the_figures_of_the_tables() -> None:
    script = [sys.executable, str(ROOT / "docs" / "claims.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"\d[\d,]*\.?\d*", printed.replace(",", "")))
    claims = METHOD.split("## 11.")[1].partition('### "4-bit')[2]
    tables = [line for line in claims.splitlines() if line.startswith("|") and not line.startswith("|--")]
    figures = {
        figure
        for line in tables
        for cell in line.split("|")[2:]
        for figure in re.findall(r"^ ([\d,]+\.?\d*)(?: (?:GB|dB|%))? $", cell)
    }
    assert len(figures) > 80
    assert sorted(figure for figure in figures if figure.replace(",", "") not in known) == []
