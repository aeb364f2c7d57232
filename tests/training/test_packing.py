"""A run whose rows lie end to end is the run with padded ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fourbit.errors import ConfigError
from fourbit.training import layout, loop
from fourbit.training.run import run


def losses(settings: Any, **changes: Any) -> tuple[list[float], list[int]]:
    config = settings(lora__dropout=0.2, **changes)
    run(config, Console(quiet=True), overwrite=True)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r["loss"] for r in records if "loss" in r], [r["tokens"] for r in records if "tokens" in r]


def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, sequences) of each batch that the loop computes from now on."""
    found: list[tuple[int, int]] = []
    original = loop.batch_of

    def counted(group: Any, *rest: Any) -> Any:
        batch = original(group, *rest)
        found.append((len(group), len(batch.input_ids)))
        return batch

    monkeypatch.setattr(loop, "batch_of", counted)
    return found


def test_packing_changes_no_result(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    padded, tokens = losses(settings, train__padding_free=False)
    packs = computed(monkeypatch)
    packed, packed_tokens = losses(settings, train__packing=150)
    assert sum(rows for rows, _ in packs) == 6 * 8
    assert len(packs) < 6 * 8
    assert packed_tokens == tokens
    assert packed == pytest.approx(padded, rel=1e-4)


def test_micro_batches_are_laid_end_to_end_where_that_is_free(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = computed(monkeypatch)
    free, tokens = losses(settings)
    assert batches == [(4, 1)] * 12
    batches.clear()
    padded, padded_tokens = losses(settings, train__padding_free=False)
    assert batches == [(4, 4)] * 12
    assert tokens == padded_tokens
    assert free == pytest.approx(padded, rel=1e-4)
    batches.clear()
    losses(settings, train__fused=False)  # torch's attention would take a mask of all tokens by all
    assert batches == [(4, 4)] * 12
    kept = yaml.safe_load((Path(settings().output) / "config.yaml").read_text())
    assert kept["train"]["padding_free"] is False


def test_a_model_that_mixes_rows(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "keeps_rows_apart", lambda *_: False)
    batches, said = computed(monkeypatch), Console(record=True, file=io.StringIO(), width=200)
    run(settings(), said, predict=True)
    assert batches == [(4, 4)] * 12
    assert "rows are padded: LlamaModel lets rows laid end to end see each other" in said.export_text()
    for key, value in (("packing", 150), ("padding_free", True)):
        message = rf"train\.{key}: LlamaModel lets rows laid end to end see each other"
        with pytest.raises(ConfigError, match=message):
            run(settings(output=str(tmp_path / key), **{f"train__{key}": value}), said)


def test_packing_is_not_padding(settings: Any) -> None:
    with pytest.raises(ConfigError, match="padding_free cannot be false"):
        settings(train__packing=150, train__padding_free=False)
