"""Memory that runs out in a step: the step is done again with less, and the run comes to the same end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fourbit.config import RunConfig, TrainSettings
from fourbit.config_file import resolve
from fourbit.errors import TrainingError
from fourbit.memory import activations
from fourbit.training import loop
from fourbit.training.relief import next_relief, reason_of
from fourbit.training.run import run
from tests.tiny import save_llama

OUT = "CUDA out of memory. Tried to allocate 2.00 GiB."


def settings(folder: Path, output: str, **train: Any) -> RunConfig:
    if not (folder / "model").exists():
        save_llama(folder / "model")
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"say {n}", "completion": str(n)}) + "\n" for n in range(24))
    )
    tree = {
        "model": {"path": str(folder / "model"), "compute_dtype": "float32", "device": "cpu"},
        "lora": {"r": 4},
        "data": {"train": str(data), "heldout_fraction": 0.2},
        "train": {
            "effective_batch": 4,
            "max_steps": 4,
            "eval_every": 2,
            "activation_checkpointing": False,
            **train,
        },
        "output": str(folder / output),
    }
    return resolve(tree)


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Computing raises, in its middle, for micro-batches of more rows than a limit, from some call on."""
    real, calls = loop.causal_lm_loss, []

    def limit(rows: int, after: int = 0, error: RuntimeError | None = None) -> None:
        def computed(model: Any, batch: Any, chunk: int) -> Any:
            calls.append(len(batch.rows.unique()))
            found = real(model, batch, chunk)
            if len(calls) > after and calls[-1] > rows:
                raise torch.OutOfMemoryError(OUT + "\nmore lines") if error is None else error
            return found

        monkeypatch.setattr(loop, "causal_lm_loss", computed)

    return limit


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_the_step_is_done_again_in_smaller_pieces(tmp_path: Path, limited: Any) -> None:
    """Rows and dropout are the same, so losses agree to the order of sums, and bytes with a run that knew."""
    run(settings(tmp_path, "whole"), Console(file=io.StringIO()))
    out = io.StringIO()
    limited(2, after=1)
    run(settings(tmp_path, "relieved"), Console(file=out, width=200))
    assert f"step 2: {OUT}: going on with micro_batch 2\n" in out.getvalue()
    assert "more lines" not in out.getvalue()
    assert losses(tmp_path / "relieved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    for key, value in adapter(tmp_path / "whole").items():
        assert torch.allclose(adapter(tmp_path / "relieved")[key], value, atol=1e-5)


def test_from_the_first_step_on_it_is_the_run_that_knew(tmp_path: Path, limited: Any) -> None:
    run(settings(tmp_path, "knew", micro_batch=1), Console(file=io.StringIO()))
    limited(1)
    run(settings(tmp_path, "learnt"), Console(file=io.StringIO()))
    assert (tmp_path / "knew/metrics.jsonl").read_text() == (tmp_path / "learnt/metrics.jsonl").read_text()


def test_a_resumed_run_keeps_what_was_given_up(tmp_path: Path, limited: Any) -> None:
    limited(2)
    run(settings(tmp_path, "whole"), Console(file=io.StringIO()))
    run(settings(tmp_path, "parts", max_steps=2), Console(file=io.StringIO()))
    out = io.StringIO()
    run(settings(tmp_path, "parts"), Console(file=out, width=200), resume=True)
    assert "memory ran out before: going on with micro_batch 2" in out.getvalue()
    assert OUT not in out.getvalue()
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()


def test_all_is_given_up_before_the_run_is(
    tmp_path: Path, limited: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "_SMALLEST", 1)
    run(settings(tmp_path, "whole", micro_batch=1), Console(file=io.StringIO()))
    out = io.StringIO()
    limited(0, after=1)
    with pytest.raises(
        TrainingError, match=r"step 2: CUDA out of memory\. .* nothing is left to give up"
    ) as error:
        run(settings(tmp_path, "run"), Console(file=out, width=200))
    assert "\n" not in str(error.value)
    given_up = [
        line.partition("going on with ")[2] for line in out.getvalue().splitlines() if "going on" in line
    ]
    assert given_up == [
        "micro_batch 2", "micro_batch 1", "activation_checkpointing True", "loss_chunk 12", "loss_chunk 3",
        "loss_chunk 1", "activation_tier disk", "optimizer_memory 0",
    ]  # fmt: skip
    # The steps after it come out the same.
    monkeypatch.undo()
    limited_run = settings(tmp_path, "again", micro_batch=1, activation_checkpointing=True, loss_chunk=1,
                           activation_tier="disk", optimizer_memory=0)  # fmt: skip
    run(limited_run, Console(file=io.StringIO()))
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_other_errors_are_raised(tmp_path: Path, limited: Any) -> None:
    limited(0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(settings(tmp_path, "run"), Console(file=io.StringIO()))


def test_what_counts_as_memory_that_ran_out() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert reason_of(error.value) is not None
    assert reason_of(torch.OutOfMemoryError("a\nb")) == "a"
    assert reason_of(MemoryError()) == "there is no memory"
    assert reason_of(RuntimeError("a")) is None


def test_packs_stay_whole() -> None:
    """Packs are computed one at a time already."""
    assert next_relief(TrainSettings(packing=64, micro_batch=8), True) == {"loss_chunk": 12}
    assert next_relief(TrainSettings(micro_batch=64, effective_batch=8), True) == {"micro_batch": 4}
    assert next_relief(TrainSettings(loss_chunk=1, micro_batch=1), False) == {"activation_tier": "host"}
