"""The documents say what is there: files, commands, names, defaults, and the figures of the script."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fourbit
from fourbit.cli.main import COMMANDS
from fourbit.config import LoraSettings, TrainSettings
from tests.cli.test_errors import CASES
from tests.data.test_forms import REFUSED
from tests.data.test_read import MALFORMED
from tests.data.test_real_templates import MODELS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
MEMORY = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "least"),
    [(README, 5), (METHOD, 5), (MEMORY, 2), (PERFORMANCE, 2)],
    ids=["README", "method", "memory", "performance"],
)
def test_named_files_exist(text: str, least: int) -> None:
    named = set(re.findall(r"(?:src|csrc|tests|demo|recipes|docs|benchmarks|requirements)/[\w./*-]*\w", text))
    assert len(named) > least
    assert [path for path in sorted(named) if not list(ROOT.glob(path))] == []


def test_named_tests_exist_and_run_when_it_is_said() -> None:
    named = re.findall(r"`([\w/]+\.py)::([\w:]+)`( \(slow\))?", RELIABILITY)
    assert len(named) > 50
    found = {path: _defined_in(ROOT / "tests" / path) for path, _, _ in named}
    wrong = [(path, name) for path, name, slow in named if found[path].get(name) is not bool(slow)]
    assert wrong == []


def _defined_in(path: Path) -> dict[str, bool]:
    """Name of each test in a file, behind its class's where it has one, and whether it is marked slow."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = [("", tree), *((f"{node.name}::", node) for node in tree.body if isinstance(node, ast.ClassDef))]
    return {
        owner + node.name: "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
        for owner, body in owners
        for node in body.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_counts_are_those_of_the_tests() -> None:
    rows = {
        cells[1].strip(): cells[2].strip()
        for line in RELIABILITY.splitlines()
        if (cells := line.split("|"))[2:]
    }
    assert rows["chat templates of real models checked token by token"].startswith(f"{len(MODELS)}, ")
    assert rows["kinds of bad data files, each with its own message"] == str(len(MALFORMED))
    assert rows["kinds of rows that mean nothing, each with its own message"] == str(len(REFUSED))
    assert rows["mistakes on the command line, each one line and an exit code"] == str(len(CASES))
    assert rows["commands run with the network cut off"].startswith(f"all {len(COMMANDS)}; ")


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
