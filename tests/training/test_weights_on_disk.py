"""Training from a checkpoint that stays on the disk, as `fourbit train` does it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import fourbit
from fourbit.config import RunConfig
from fourbit.config_file import resolve
from fourbit.errors import ConfigError, MemoryBudgetError
from fourbit.memory import activations
from fourbit.memory.plan import Choice
from fourbit.memory.stream import stream_of
from fourbit.training import run as run_module
from fourbit.training.planner import Planner
from fourbit.training.run import run
from fourbit.training.target import Rows, Target
from tests.tiny import byte_tokenizer, llama


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama(layers=6, hidden=256).to(torch.bfloat16).save_pretrained(str(folder / "plain"))
    byte_tokenizer().save_pretrained(str(folder / "plain"))
    fourbit.save_quantized(*fourbit.load(folder / "plain", compute_dtype="float32"), folder / "packed")
    return folder / "packed"


def settings(packed: Path, folder: Path, output: str, tier: str = "device", **train: Any) -> RunConfig:
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"say {n}", "completion": str(n)}) + "\n" for n in range(40)),
        encoding="utf-8",
    )
    tree = {
        "model": {"path": str(packed), "compute_dtype": "float32", "device": "cpu", "weight_tier": tier},
        "lora": {"r": 4},
        "data": {"train": str(data), "heldout_fraction": 0.2, "max_length": 64},
        "train": {"effective_batch": 4, "micro_batch": 2, "max_steps": 4, "eval_every": 2, **train},
        "output": str(folder / output),
    }
    return resolve(tree)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_the_same_run(packed: Path, tmp_path: Path) -> None:
    """Bytes of adapters and metrics do not depend on where the weights are, nor do those of a resumed run."""
    console = Console(file=io.StringIO())
    run(settings(packed, tmp_path, "held"), console)
    found = run(settings(packed, tmp_path, "mapped", "disk"), console)
    held, mapped = adapter(tmp_path / "held"), adapter(tmp_path / "mapped")
    assert held.keys() == mapped.keys()
    assert all(torch.equal(held[name], mapped[name]) for name in held)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("held", "mapped")]
    assert metrics[0] == metrics[1]
    assert found.metrics["weights_read_bytes"] > 0
    assert found.metrics["weights_waiting_seconds"] >= 0
    more = settings(packed, tmp_path, "mapped", max_steps=6)
    run(more, console, resume=True)
    run(settings(packed, tmp_path, "whole", max_steps=6), console)
    resumed, whole = adapter(tmp_path / "mapped"), adapter(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_inputs_of_layers_on_the_disk(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes wherever the inputs of layers wait, whether resumed there or here."""
    console = Console(file=io.StringIO())
    monkeypatch.setattr(activations, "_SMALLEST", 1)
    run(settings(packed, tmp_path, "held"), console)
    run(settings(packed, tmp_path, "moved", activation_tier="disk", max_steps=2), console)
    run(settings(packed, tmp_path, "moved"), console, resume=True)
    run(settings(packed, tmp_path, "both", "disk", activation_tier="disk"), console)
    held = adapter(tmp_path / "held")
    for name in ("moved", "both"):
        assert all(torch.equal(held[key], value) for key, value in adapter(tmp_path / name).items())
        assert (tmp_path / name / "metrics.jsonl").read_text() == (
            tmp_path / "held/metrics.jsonl"
        ).read_text()
    with pytest.raises(ConfigError, match=r"activation_tier: disk .* needs train\.activation_checkpointing"):
        settings(packed, tmp_path, "x", activation_tier="disk", activation_checkpointing=False)


def test_a_budget_puts_them_there(packed: Path, tmp_path: Path) -> None:
    config = settings(packed, tmp_path, "run", micro_batch=1)
    planner = Planner(
        config, Target("CPU", True, torch.float32, None), Rows(longest=64, count=32), runtime=10**8
    )
    on_disk = planner.plan(Choice(1, True, 24, 0, "disk"))
    held = planner.plan(Choice(1, True, 24, 0, "device"))
    part = next(part for part in on_disk.held if part.name == "packed weights")
    whole = planner.weights.codes + planner.weights.scales
    assert (part.tier, part.size) == ("disk", -(-whole // 6))
    assert held.peak - on_disk.peak == whole - part.size
    least = planner.plan(Choice(1, True, 6, 0, "disk")).most
    chosen = planner.choose(least).choice
    assert chosen.weight_tier == "disk"
    assert "weights on disk" in chosen.text()
    assert planner.choose(2 * held.peak).choice.weight_tier == "device"
    with pytest.raises(MemoryBudgetError, match="weights on disk"):
        planner.choose(least - 1)


def test_a_plan_counts_inputs_of_layers_on_the_disk(packed: Path, tmp_path: Path) -> None:
    config = settings(packed, tmp_path, "run", micro_batch=1)
    rows = Rows(longest=512, count=32, heldout=(0, 0))
    planner = Planner(config, Target("CPU", True, torch.float32, None), rows, runtime=10**8)
    held, host, disk = (
        planner.plan(Choice(1, True, 1, None, "device", tier)) for tier in ("device", "host", "disk")
    )
    assert host.peak == held.peak  # a CPU's memory is the host's
    assert held.peak - disk.peak == (6 - activations.IN_MEMORY) * 512 * 256 * 4
    assert "MB more on disk" in disk.phases[1].parts[0].detail
    chosen = planner.choose(planner.plan(Choice(1, True, 6, 0, "disk", "disk")).most).choice
    assert chosen.activation_tier == "disk"
    assert "activations on disk" in chosen.text()
    assert planner.choose(10**9).choice.activation_tier == "device"


@pytest.mark.parametrize(("room", "where"), [(False, "disk"), (True, "device")])
def test_a_run_under_a_budget(packed: Path, tmp_path: Path, room: bool, where: str, monkeypatch: Any) -> None:
    """Loaded from the disk, and held where the plan finds room for all."""
    monkeypatch.setattr("fourbit.training.planner.runtime_bytes", lambda *_: 10**8)
    config = settings(packed, tmp_path, "run", max_steps=1)
    if not room:
        monkeypatch.setattr(Planner, "tiers", property(lambda self: ("disk",)))
    held: list[bool] = []
    hold = run_module.hold_weights
    monkeypatch.setattr(
        run_module, "hold_weights", lambda model: (held.append(stream_of(model) is not None), hold(model))
    )
    out = io.StringIO()
    found = run(config, Console(file=out, width=200), memory=4 * 10**9)
    assert ("weights_read_bytes" in found.metrics) == (where == "disk")
    assert ("weights on disk" in out.getvalue()) == (where == "disk")
    assert found.metrics["plan"]["choice"]["weight_tier"] == where
    assert held == [True] * room
