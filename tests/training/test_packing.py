"""A run with packed rows is the run with padded ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fourbit.training import loop
from fourbit.training.run import run


def losses(settings: Any, **changes: Any) -> tuple[list[float], list[int]]:
    config = settings(lora__dropout=0.2, **changes)
    run(config, Console(quiet=True), overwrite=True)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r["loss"] for r in records if "loss" in r], [r["tokens"] for r in records if "tokens" in r]


def test_packing_changes_no_result(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    padded, tokens = losses(settings)
    packs: list[int] = []
    original = loop.collate_packed
    monkeypatch.setattr(
        loop, "collate_packed", lambda examples, pad: packs.append(len(examples)) or original(examples, pad)
    )
    packed, packed_tokens = losses(settings, train__packing=150)
    assert sum(packs) == 6 * 8
    assert len(packs) < 6 * 8
    assert packed_tokens == tokens
    assert packed == pytest.approx(padded, rel=1e-4)
