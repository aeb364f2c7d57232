"""A run says what it was made from and how its base was held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fourbit
from fourbit.config_file import load_config
from fourbit.exporting import provenance
from tests.training.test_run import quiet


@pytest.mark.parametrize("quant_type", ["fp4", "none"])
def test_a_loaded_model_is_recorded_as_it_is(
    quant_type: str, settings: Any, data: Path, tmp_path: Path
) -> None:
    """The settings of a run in Python do not say how its model was loaded; the model does."""
    path = settings().model.path
    model, tokenizer = fourbit.load(
        path, quant_type=quant_type, block_size=128, double_quant=False, device="cpu"
    )
    adapted = fourbit.add_lora(model, r=2)
    options: dict[str, Any] = {"max_steps": 1, "max_length": 64, "heldout_fraction": 0.25}
    result = fourbit.train(adapted, tokenizer, data, output=tmp_path / "out", console=quiet(), **options)
    for folder in (result.folder, result.adapter):
        (step,) = provenance.read(folder)
        assert step.kind == "train"
        held = {key: step.settings["model"][key] for key in ("quant_type", "block_size", "double_quant")}
        if quant_type == "none":
            assert held["quant_type"] == "none"
        else:
            assert held == {"quant_type": "fp4", "block_size": 128, "double_quant": False}
        assert [(source.role, source.path) for source in step.sources] == [
            ("base", path),
            ("data", str(data)),
        ]
        assert step.sources[0].sha256 == provenance.describe("base", path).sha256
        assert step.effect["heldout_loss"] == result.metrics["heldout_loss"]
    assert load_config(result.folder / "config.yaml").model.quant_type == quant_type
