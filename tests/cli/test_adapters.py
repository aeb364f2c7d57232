"""`fourbit adapters` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from fourbit.exporting import provenance
from fourbit.model.adapters import add_lora
from fourbit.model.load import load
from tests.cli.conftest import Fourbit
from tests.nn.test_lora import fill_b
from tests.tiny import llama

PLAIN = ("--set", "model.quant_type=none", "--set", "model.compute_dtype=float32")


@pytest.fixture
def adapters(here: Path) -> Path:
    """runs/one and runs/two with an adapter each, as of finished runs on `model`, and a loose one."""
    for number, name in enumerate(("runs/one/adapter", "runs/two/adapter", "loose"), start=1):
        base, _ = load("model", quant_type="none", compute_dtype="float32")
        model = add_lora(base, r=2 * number, alpha=8, rslora=number == 2, seed=number)
        fill_b(model, seed=number)
        model.save_pretrained(name, save_embedding_layers=False)
    (here / "runs/one/summary.json").write_text('{"heldout_loss": 1.25}')
    settings = {
        "model": {"path": "model", "quant_type": "none", "compute_dtype": "float32"},
        "data": {"train": "rows.jsonl"},
        "eval": {"max_new_tokens": 4},
    }
    (here / "runs/one/config.yaml").write_text(json.dumps(settings))
    return here


def record(folder: Path, base: str) -> None:
    source = provenance.Source("base", "model", base)
    provenance.write(folder, [provenance.make_step("train", [source], {}, {"heldout_loss": 0.5}, "c")])


class TestList:
    def test_json(self, fourbit: Fourbit, adapters: Path) -> None:
        record(adapters / "loose", "1" * 64)
        code, out, _ = fourbit("adapters", "list", ".", "runs", "--json")
        found = {entry["folder"]: entry for entry in json.loads(out)["adapters"]}
        assert code == 0
        assert list(found)[:3] == ["loose", "runs/one/adapter", "runs/two/adapter"]
        one, two, loose = (found[name] for name in ("runs/one/adapter", "runs/two/adapter", "loose"))
        assert (one["name"], one["base"], one["ranks"], one["alpha"]) == ("one", "model", [2], 8)
        assert (one["variant"], two["variant"]) == ("LoRA", "rsLoRA")
        assert "q_proj" in one["targets"]
        assert (one["heldout_loss"], two["heldout_loss"], loose["heldout_loss"]) == (1.25, None, 0.5)
        assert (one["steps"], loose["steps"]) == ([], ["train"])
        assert one["sha256"] == provenance.describe("adapter", "runs/one/adapter").sha256
        assert one["bytes"] == Path("runs/one/adapter/adapter_model.safetensors").stat().st_size

    def test_table_and_damage(self, fourbit: Fourbit, adapters: Path) -> None:
        (adapters / "loose/adapter_model.safetensors").write_bytes(b"no")
        code, out, error = fourbit("adapters", "list", ".")
        assert (code, error) == (4, "")
        lines = out.splitlines()
        assert lines[0] == "runs/one/adapter"
        assert lines[1].startswith("  LoRA, rank 2, alpha 8, 0.00 M parameters, 0.0 MB, SHA-256 ")
        assert lines[3] == "  base model; held-out loss 1.2500"
        assert lines[5].startswith("  rsLoRA, rank 4, alpha 8")
        assert "loose/adapter_model.safetensors: cannot be read" in out

    def test_none(self, fourbit: Fourbit) -> None:
        assert fourbit("adapters", "list", "model") == (0, "no adapters there\n", "")
        code, _, error = fourbit("adapters", "list", "nowhere")
        assert (code, error) == (4, "fourbit adapters: error: nowhere: no such folder\n")


class TestCombine:
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
    def test_scores_and_record(self, fourbit: Fourbit, adapters: Path) -> None:
        for name in ("runs/one/adapter", "runs/two/adapter"):
            record(adapters / name, "1" * 64)
        code, out, error = fourbit(
            "adapters", "combine", "runs/one=0.75", "runs/two/adapter=0.25", "--type", "cat",
            "--output", "both", "--data", "rows.jsonl", "--limit", "5", "--score", "--json",
        )  # fmt: skip
        result = json.loads(out)
        assert (code, error) == (0, "")
        assert (result["rank"], result["layers"]) == (6, 14)
        assert result["deviation"] < 1e-6
        assert list(result["scores"]) == ["runs/one/adapter", "runs/two/adapter", "both"]
        assert {score["rows"] for score in result["scores"].values()} == {5}
        assert all(0 <= score["accuracy"] <= 1 for score in result["scores"].values())
        losses = [score["heldout_loss"] for score in result["scores"].values()]
        assert len(set(losses)) == 3

        train, step = provenance.read(Path("both"))
        assert (train.kind, step.kind) == ("train", "combine")
        assert [source.role for source in step.sources] == ["adapter", "adapter"]
        assert step.sources[0].sha256 == provenance.describe("adapter", "runs/one/adapter").sha256
        assert step.settings["weights"] == [0.75, 0.25]
        assert step.effect["heldout_loss"] == losses[2]
        assert [found["heldout_loss"] for found in step.effect["inputs"]] == losses[:2]
        PeftModel.from_pretrained(llama(), "both")

        code, out, _ = fourbit("adapters", "list", "both", "--json")
        (entry,) = json.loads(out)["adapters"]
        assert (entry["steps"], entry["heldout_loss"]) == (["train", "combine"], losses[2])

    def test_the_score_is_that_of_eval(self, fourbit: Fourbit, adapters: Path) -> None:
        _, out, _ = fourbit(
            "adapters", "combine", "loose=1", "runs/two=0", "--type", "cat", "--output", "both",
            "--data", "rows.jsonl", "--model", "model", *PLAIN, "--json",
        )  # fmt: skip
        scores = json.loads(out)["scores"]
        _, out, _ = fourbit(
            "eval", "--model", "model", "--adapter", "loose", "--data", "rows.jsonl", *PLAIN, "--json"
        )
        wanted = json.loads(out)["adapter"]["loss"]
        assert scores["loose"]["heldout_loss"] == pytest.approx(wanted, rel=1e-6)
        assert scores["both"]["heldout_loss"] == pytest.approx(wanted, rel=1e-5)

    def test_table(self, fourbit: Fourbit, adapters: Path) -> None:
        code, out, _ = fourbit(
            "adapters", "combine", "runs/one=0.7", "loose=-0.3", "--output", "both", "--rank", "3",
            "--data", "rows.jsonl",
        )  # fmt: skip
        assert code == 0
        assert "both: svd of 2 adapters, rank 3, 14 layers" in out
        assert " % away from the weighted sum" in out
        assert "-0.3" in out
        assert "combined" in out

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            ("", 2, "say what to do: `fourbit adapters list FOLDER`"),
            ("combine runs/one=1 runs/two=1", 2, "--output"),
            ("combine runs/one runs/two=1 --output x", 2, "runs/one: write it as FOLDER=WEIGHT"),
            ("combine runs/one=much runs/two=1 --output x", 2, "runs/one=much: write it as FOLDER=WEIGHT"),
            ("combine runs/one=1 runs/one/adapter=1 --output x", 2, "runs/one/adapter is given twice"),
            ("combine runs/one=1 --output x", 2, "give at least two adapters"),
            ("combine runs/one=1 runs/tow=1 --output x", 4, "runs/tow: no adapter here"),
            ("combine runs/one=1 runs/two=1 --type linear --output x", 4, "linear needs one rank"),
            ("combine runs/one=1 runs/two=1 --type ties --output x", 2, "ties needs a density"),
            ("combine runs/one=1 runs/two=1 --output runs", 4, "runs: exists already"),
            ("combine runs/one=1 runs/two=1 --output x --score", 2, "--score and --limit need --data"),
            ("combine runs/one=1 runs/two=1 --output x --data no.csv", 3, "no.csv"),
            ("combine runs/one=1 runs/two=1 --output x --data rows.jsonl --limit 0", 2, "--limit 0"),
        ],
    )
    def test_mistakes(self, fourbit: Fourbit, adapters: Path, words: str, code: int, message: str) -> None:
        found, out, error = fourbit("adapters", *words.split())
        assert (found, out) == (code, "")
        assert error.startswith("fourbit adapters: error: ")
        assert message in error
        assert error.count("\n") == 1
        assert not Path("x").exists()

    def test_bases_by_record(self, fourbit: Fourbit, adapters: Path) -> None:
        """The record knows a base by its content: what its folder is called then says nothing."""
        words = ("adapters", "combine", "runs/one=1", "runs/two=1", "--output")
        config = adapters / "runs/two/adapter/adapter_config.json"
        renamed: dict[str, Any] = {**json.loads(config.read_text()), "base_model_name_or_path": "elsewhere"}
        config.write_text(json.dumps(renamed))
        code, _, error = fourbit(*words, "x")
        assert (code, "made for model and" in error) == (4, True)
        record(adapters / "runs/one/adapter", "1" * 64)
        record(adapters / "runs/two/adapter", "1" * 64)
        assert fourbit(*words, "x")[0] == 0
        record(adapters / "runs/two/adapter", "2" * 64)
        code, _, error = fourbit(*words, "y")
        assert (code, "were trained on different bases (SHA-256 111111111111 and" in error) == (4, True)
        assert fourbit(*words, "y", "--same-base")[0] == 0
