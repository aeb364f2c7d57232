"""A short round of fuzzing; fuzz/README.md has the long one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from fourbit import limits
from fuzz.mutate import mutated
from fuzz.targets import CORPUS, TARGETS, corpus, run_one


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What libraries say of strange input is no failure here."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def test_every_parser_has_inputs() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_taken_or_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    monkeypatch.setattr(limits, "_LOOK_EVERY", 0.05)
    target, seeds = TARGETS[name], corpus(name)
    taken = [run_one(target, data, tmp_path / "x") for data in seeds]
    assert any(taken), "not even the inputs it was made for"
    for data in mutated(seeds, 10 if target.slow else 60, seed=1):
        run_one(target, data, tmp_path / "x")
