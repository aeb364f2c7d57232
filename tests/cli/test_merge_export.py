"""`fourbit merge` and `fourbit export` after a run, with the record from quantizing to serving."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourbit as package
from fourbit.cli import checked
from fourbit.exporting import provenance
from tests.cli.conftest import Fourbit, furnish, train_in
from tests.exporting.adapters import load_with_peft, logits
from tests.tiny import save_llama

SMALL = [
    *("--model", "model", "--data", "rows.jsonl", "--output", "run", "--set", "train.max_steps=2"),
    *("--set", "train.learning_rate=0.01", "--set", "data.max_length=64", "--set", "train.effective_batch=4"),
]

UNREAD = "--no-verify"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    furnish(folder, models)
    return train_in(folder, SMALL)


@pytest.fixture
def run(trained: Path, here: Path) -> str:
    shutil.copytree(trained, here / "run")
    return "run"


def test_the_names_are_functions_and_the_package_is_a_package() -> None:
    assert callable(package.merge)
    assert callable(package.export)
    importlib.import_module("fourbit.exporting.hf")
    assert callable(package.export)


def test_merge_both_targets(fourbit: Fourbit, run: str, here: Path) -> None:
    code, out, error = fourbit("merge", UNREAD, run, "merged")
    assert (code, error) == (0, "")
    assert out.startswith(f"LoRA of {Path('run/adapter')} into the original weights of model: 14 weights")
    assert out.splitlines()[-1] == "serve it: vllm serve merged"
    expected = load_with_peft(here / "model", here / "run" / "adapter")
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0.03, atol=0.03)

    code, out, _ = fourbit("merge", UNREAD, "run", "restored", "--into", "dequantized", "--json")
    report = json.loads(out)
    assert report["merge"]["quantization"] == {"quant_type": "nf4", "block_size": 64, "double_quant": True}
    assert report["merge"]["base_verified"] is True
    assert (code, report["commands"]) == (0, ["vllm serve restored"])


def test_export_by_name(fourbit: Fourbit, run: str, here: Path) -> None:
    code, out, _ = fourbit("export", UNREAD, run, "--to", "bnb", "packed")
    assert code == 0
    assert "quantized again, 4.1" in out
    assert "relative error of a weight 0.0" in out or "relative error of a weight 0.1" in out
    code, out, _ = fourbit("export", UNREAD, "packed", "--to", "hf", "flat", "--dtype", "float32", "--json")
    result = json.loads(out)
    assert (code, result["merge"], result["kind"]) == (0, None, "hf")
    config = json.loads((here / "flat" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    # `run` given by its parts
    assert fourbit("export", UNREAD, "model", "--adapter", "run/adapter", "--to", "hf", "again")[0] == 0


def test_the_chain_from_quantizing_to_exporting(fourbit: Fourbit, here: Path) -> None:
    assert fourbit("quantize", "model", "packed-base")[0] == 0
    words = ["packed-base" if word == "model" else word for word in SMALL]
    assert fourbit("train", *words)[0] == 0
    assert fourbit("export", UNREAD, "run", "--to", "bnb", "served")[0] == 0
    chain = provenance.read(here / "served")
    assert [step.kind for step in chain] == ["quantize", "train", "merge", "export"]
    quantize, train, merge, export = chain
    original = provenance.describe("base", here / "model").sha256
    assert quantize.sources[0].sha256 == original
    assert quantize.effect["bits_per_weight"] == pytest.approx(4.127, abs=0.05)
    roles = {source.role: source.sha256 for source in train.sources}
    assert roles["base"] == provenance.describe("base", here / "packed-base").sha256
    assert roles["data"] == provenance.describe("data", here / "rows.jsonl").sha256
    assert train.settings["train"]["max_steps"] == 2
    assert train.effect["best_step"] == 2
    assert merge.settings["into"] == "dequantized"
    assert merge.sources[1].sha256 == provenance.describe("adapter", here / "run" / "adapter").sha256
    assert export.effect["mean_weight_error"] > 0
    # What was quantized is the original, and so the base by record.
    code, out, _ = fourbit("merge", UNREAD, "run", "full", "--original", "model", "--json")
    assert code == 0
    assert json.loads(out)["merge"]["into"] == "original"
    assert json.loads(out)["merge"]["base_verified"] is True


def test_a_merge_is_read_back_and_its_figures_are_recorded(fourbit: Fourbit, run: str, here: Path) -> None:
    words = ("merge", run, "out", "--data", "rows.jsonl", "--into", "dequantized", "--dtype", "float32")
    code, out, error = fourbit(*words)
    assert (code, error) == (0, "")
    assert "16 held-out rows" in out
    assert "out: read by transformers" in out
    effect = provenance.read(here / "out")[-1].effect
    assert effect["heldout_loss"] == pytest.approx(effect["heldout_loss_before"], rel=0.01)
    assert effect["top1_agreement"] > 0.97
    assert json.loads((here / "out" / "verification.json").read_text())["reference"]["loss"] > 0


def test_what_lost_too_much_is_an_error_unless_accepted(fourbit: Fourbit, run: str, here: Path) -> None:
    words = ("export", run, "--to", "bnb", "--data", "rows.jsonl", "--agreement", "100", "--threshold", "0")
    code, out, error = fourbit(*words, "packed")
    assert code == 7
    assert error.startswith("fourbit export: error: packed: its ")
    assert error.endswith("or --accept-loss\n")
    assert "packed" in out
    assert (here / "packed" / "verification.json").exists()
    code, out, error = fourbit(*words, "again", "--accept-loss", "--json")
    assert (code, error.count("error")) == (0, 0)
    assert json.loads(out)["verification"]["checked"][0]["losses"]


@pytest.mark.parametrize("target", ["original", "dequantized"])
def test_the_better_target_is_chosen_by_measurement(
    fourbit: Fourbit, run: str, here: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    measure = checked._measure

    def apart(*words: Any) -> Any:
        """The two losses, which the small model has alike, a quarter apart."""
        found = measure(*words)
        if words[3] != "choose":
            return found
        loss = found.checked[0].measured.loss + (0.25 if target == "original" else -0.25)
        return replace(found, reference=replace(found.reference, loss=loss))

    monkeypatch.setattr(checked, "_measure", apart)
    code, out, error = fourbit("merge", run, "out", "--data", "rows.jsonl", "--accept-loss")
    assert (code, error) == (0, "")
    found = re.search(r"merging into the (\w+) weights: .* ones ([0-9.]+), on the nf4 .* ([0-9.]+)", out)
    assert found is not None
    assert found[1] == target
    assert (float(found[2]) < float(found[3])) == (target == "original")
    assert f"into the {target} " in out.splitlines()[1]
    assert provenance.read(here / "out")[-1].settings["into"] == target


def test_what_cannot_be_verified_is_said(fourbit: Fourbit, run: str) -> None:
    code, out, _ = fourbit("export", "model", "--to", "hf", "out")
    assert code == 0
    assert out.startswith("the result will not be verified: only a run has held-out rows")
    code, out, _ = fourbit("export", run, "--to", "lora-gguf", "adapter.gguf")
    assert out.startswith("the result will not be verified: a LoRA file is read on its base as .gguf")


def test_a_model_trained_whole_is_exported_as_it_is(fourbit: Fourbit, here: Path) -> None:
    settings = ["--set", "lora=none", "--set", "model.quant_type=none"]
    assert fourbit("train", *SMALL, *settings)[0] == 0
    assert fourbit("merge", UNREAD, "run", "out")[0] == 2
    code, out, _ = fourbit("export", UNREAD, "run", "--to", "hf", "out", "--json")
    assert (code, json.loads(out)["merge"]) == (0, None)
    trained = AutoModelForCausalLM.from_pretrained("run/adapter", dtype=torch.bfloat16).state_dict()
    written = AutoModelForCausalLM.from_pretrained("out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in written.items())


def test_one_line_for_each_mistake(fourbit: Fourbit, run: str, here: Path) -> None:
    save_llama(here / "other", torch.float32)
    cases: list[tuple[str, int, str]] = [
        ("merge model out", 2, "model: no adapter to merge; give a run folder, or a model and an adapter"),
        ("merge run plain", 2, "plain: exists and is not empty; choose another folder, or --overwrite"),
        ("merge run run --overwrite", 2, "run: would replace "),
        (
            "merge run model --overwrite",
            2,
            "model: would replace model, which is read; choose another output",
        ),
        ("merge run/adapter out", 4, "run/adapter: an adapter alone; give its base, and this with --adapter"),
        ("merge ./nowhere out --adapter run/adapter", 4, "./nowhere: no such model folder or .gguf file"),
        ("merge other out --adapter run/adapter", 4, "other: not the base that run/adapter was trained on"),
        ("export run --to hf out --quant Q8_0", 2, "quant Q8_0 is for gguf; hf has none to choose"),
        ("export run --to gguf out.gguf --dtype float16", 2, "dtype is not for gguf; choose the quant"),
        (
            "export run --to bnb out --calibrate rows.jsonl",
            2,
            "calibration rows, group size and install are for gptq",
        ),
        ("export model --to gptq out", 2, "gptq is calibrated on rows; give them with --calibrate"),
        ("export run --to gguf out", 2, "out: gguf is one file; name it out.gguf"),
        ("export model --to lora-gguf out.gguf", 2, "lora-gguf writes an adapter: give a run folder"),
        ("export model --to hf out --into original", 2, "model: there is no adapter, so nothing is merged"),
    ]
    for command, expected, message in cases:
        name, *words = command.split()
        code, _, error = fourbit(name, UNREAD, *words)
        assert error.startswith(f"fourbit {name}: error: {message}"), error
        assert error.count("\n") == 1
        assert code == expected, command
        assert not (here / "out").exists()
    assert fourbit("merge", UNREAD, run, "once")[0] == 0
    code, _, error = fourbit("merge", UNREAD, "once", "out", "--adapter", "run/adapter", "--any-base")
    assert (code, "is merged into it already" in error) == (4, True)


def test_progress_is_reported(run: str, here: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    package.merge(run, "out", progress=lambda *report: seen.append(report))
    stages: dict[str, Any] = {stage: (done, total) for stage, done, total in seen}
    assert set(stages) == {"identify the base (MB)", "write weights"}
    assert all(done == total for done, total in stages.values())
