"""The commands one after another, as a newcomer types them, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit as package
from fourbit.cli.main import COMMANDS, main
from fourbit.config_file import load_config
from fourbit.model.load import load
from fourbit.training import loop
from tests.cli.conftest import Fourbit

SETTINGS = (
    "model.compute_dtype=float32",
    "data.max_length=64",
    "train.max_steps=4",
    "train.epochs=100",
    "train.effective_batch=4",
    "train.eval_every=2",
    "eval.max_new_tokens=4",
)
SMALL = ["--output", "run", *(word for setting in SETTINGS for word in ("--set", setting))]
RUN_FOLDER = {
    "config.yaml",
    "metrics.jsonl",
    "timing.jsonl",
    "summary.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "checkpoints/step-000002/state.json",
    "checkpoints/step-000004/state.json",
}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def init(fourbit: Fourbit) -> None:
    code, out, _ = fourbit("init", "run.yaml", "--model", "model", "--data", "rows.jsonl", "--json")
    assert (code, json.loads(out)) == (0, {"config": "run.yaml", "missing": []})


@pytest.mark.planned
def test_init_train_eval_quantize(fourbit: Fourbit, here: Path) -> None:
    init(fourbit)
    code, out, _ = fourbit("train", "run.yaml", *SMALL)
    assert code == 0
    assert "finished after 4 steps, " in out
    assert out.endswith("adapter: run/adapter\ntalk to it: fourbit chat run\n")
    assert files(here / "run") >= RUN_FOLDER
    assert load_config(here / "run" / "config.yaml").train.max_steps == 4

    code, out, _ = fourbit("eval", "run", "--data", "rows.jsonl")
    assert code == 0
    assert "16 rows" in out

    # The config that a run was trained from leads to the run as well.
    code, again, _ = fourbit("eval", "run/config.yaml", "--data", "rows.jsonl")
    assert code == 0
    assert "adapter" in again

    code, out, _ = fourbit("quantize", "model", "packed")
    assert code == 0
    assert "14 linear layers in nf4" in out
    assert out.splitlines()[-1].startswith("wrote packed: ")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files(here / "packed")
    loaded, written = (dict(load(here / name)[0].named_parameters()) for name in ("model", "packed"))
    packed = [name for name, parameter in loaded.items() if parameter.dtype == torch.uint8]
    assert len(packed) == 3 * 14
    assert all(torch.equal(loaded[name], written[name]) for name in packed)


def test_json_is_all_there_is_on_standard_output(fourbit: Fourbit, here: Path) -> None:
    init(fourbit)
    code, out, error = fourbit("train", "run.yaml", *SMALL, "--json")
    result: dict[str, Any] = json.loads(out)
    assert code == 0
    assert (result["stopped"], result["steps"], result["folder"]) == ("done", 4, "run")
    assert result["adapter"] == str(Path("run") / "adapter")
    assert {"heldout_loss", "tokens_per_second", "peak_bytes", "trainable_parameters"} <= set(result)
    assert json.loads((here / "run" / "summary.json").read_text()).items() <= result.items()
    assert "step 4/4" in error

    code, out, _ = fourbit("eval", "run", "--data", "rows.jsonl", "--json")
    result = json.loads(out)
    assert (code, list(result), result["adapter"]["rows"]) == (0, ["base", "adapter", "difference"], 16)

    code, out, error = fourbit("quantize", "model", "packed", "--json")
    result = json.loads(out)
    assert (code, result["folder"], result["layers"]) == (0, "packed", 14)
    assert 4.1 < result["bits_per_weight"] < 4.2
    assert result["bytes"] < (here / "packed" / "model.safetensors").stat().st_size
    assert 0.05 < result["mean_weight_error"] < 0.12
    assert error == ""
    code, _, error = fourbit("quantize", "packed", "again")
    assert (code, error) == (
        4,
        "fourbit quantize: error: packed: is in 4 bits already; train and evaluate take it as it is\n",
    )


def test_a_dry_run_says_what_would_happen_and_writes_nothing(fourbit: Fourbit, here: Path) -> None:
    init(fourbit)
    before = files(here)
    code, out, error = fourbit("train", "run.yaml", *SMALL, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert (plan["rows"], plan["train_rows"], plan["heldout_rows"], plan["steps"]) == (16, 15, 1, 4)
    assert plan["config"]["train"]["max_steps"] == 4
    assert plan["trainable_parameters"] < plan["parameters"]
    assert "would train 15 rows in 4 steps; nothing was written" in error
    assert files(here) == before


@pytest.mark.planned
def test_a_dry_run_predicts_memory_and_time(fourbit: Fourbit) -> None:
    init(fourbit)
    code, out, error = fourbit("train", "run.yaml", *SMALL, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["predicted_peak_bytes"] == plan["plan"]["peak"]
    assert plan["predicted_seconds"] > 0
    assert "time: about 0:0" in error


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(
    fourbit: Fourbit, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop._optimizer_step, []

    def step(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    init(fourbit)
    monkeypatch.setattr(loop, "_optimizer_step", step)
    code, out, _ = fourbit("train", "run.yaml", *SMALL)
    assert code == 130
    assert "interrupted, everything is saved, after 3 steps" in out
    hint = out.splitlines()[-1]
    assert hint == "go on: fourbit train run/config.yaml --resume"
    code, out, _ = fourbit(*hint.removeprefix("go on: fourbit ").split())
    assert code == 0
    assert "finished after 4 steps" in out
    assert len(calls) == 4


def test_ctrl_c_elsewhere_is_one_line(fourbit: Fourbit, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fourbit.exporting.streamed.stream_model", interrupted)
    assert fourbit("quantize", "model", "packed") == (130, "", "fourbit quantize: interrupted\n")


def test_help_and_version(fourbit: Fourbit) -> None:
    for words in ((), ("--help",), ("-h",)):
        code, out, _ = fourbit(*words)
        assert code == 0
        assert all(f"  {name} " in out and text in out for name, text in COMMANDS.items())
    assert fourbit("--version") == (0, f"fourbit {package.__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(f"usage: fourbit {name} ")
    assert f"fourbit {name} " in out.partition(" example: ")[2] + " "


@pytest.mark.parametrize(
    "statement",
    [
        "import fourbit",
        "import fourbit.cli.main as m; m.main(['--help'])",
        "import fourbit.cli.main as m; m.main(['--version'])",
        "import fourbit.cli.main as m; m.main(['init', 'new.yaml'])",
        "import fourbit.cli.main as m; m.main(['train', 'missing.yaml'])",
    ],
)
def test_what_needs_no_model_imports_no_torch(statement: str, tmp_path: Path) -> None:
    """Each must answer at once; torch and transformers take seconds to import."""
    heavy = "{'torch', 'transformers', 'peft', 'numpy', 'datasets', 'bitsandbytes'}"
    program = f"import sys\n{statement}\nassert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True)
