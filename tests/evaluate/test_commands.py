"""`fourbit eval` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourbit.model.adapters import add_lora
from tests.evaluate.conftest import COLORS, Run, build


@pytest.fixture
def test_file(tmp_path: Path) -> str:
    path = tmp_path / "test.csv"
    path.write_text(
        "question,color\n" + "".join(f"{question},{color}\n" for question, color in COLORS.items())
    )
    return str(path)


PLAIN = ("--set", "model.quant_type=none", "--set", "model.compute_dtype=float32")
COLUMNS = (
    "--set",
    "data.prompt={question}",
    "--set",
    "data.completion={color}",
    "--set",
    "eval.max_new_tokens=8",
)


class TestEval:
    def test_base_and_adapter(self, run: Run, model_folder: str, adapter_folder: str, test_file: str) -> None:
        code, out, _ = run(
            "eval", "--model", model_folder, "--adapter", adapter_folder, "--data", test_file,
            *PLAIN, *COLUMNS, "--labels-from-column", "color", "--json",
        )  # fmt: skip
        result = json.loads(out)
        assert code == 0
        assert list(result) == ["base", "adapter"]
        assert result["base"]["accuracy"]["right"] == result["base"]["choice_accuracy"]["right"] == 4
        assert result["adapter"]["accuracy"]["right"] == 0
        assert result["base"]["loss"] < 0.1 < result["adapter"]["loss"]

    def test_table(self, run: Run, model_folder: str, test_file: str) -> None:
        code, out, _ = run(
            "eval", "--model", model_folder, "--data", test_file, *PLAIN, *COLUMNS, "--choices", "red, green"
        )
        assert code == 0
        assert "4 rows" in out
        assert "100.0% [51.0%, 100.0%]" in out
        assert "50.0% [15.0%, 85.0%]" in out
        for question, color in list(COLORS.items())[:2]:
            assert out.count(question) == 1
            assert out.count(color) == 2

    def test_limit_and_fast(self, run: Run, model_folder: str, test_file: str) -> None:
        code, out, _ = run(
            "eval",
            "--model",
            model_folder,
            "--data",
            test_file,
            *PLAIN,
            *COLUMNS,
            "--limit",
            "2",
            "--fast",
            "--json",
        )
        result = json.loads(out)["base"]
        assert (code, result["rows"], result["loss"], result["accuracy"]["right"]) == (0, 2, None, 2)

    def test_a_runs_heldout_rows(self, run: Run, tmp_path: Path, model_folder: str, test_file: str) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        add_lora(build("llama"), r=4).save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        settings = {
            "model": {"path": model_folder, "quant_type": "none", "compute_dtype": "float32"},
            "data": {
                "train": test_file,
                "prompt": "{question}",
                "completion": "{color}",
                "heldout_fraction": 0.5,
            },
            "eval": {"max_new_tokens": 8},
        }
        (folder / "config.yaml").write_text(json.dumps(settings))
        code, out, _ = run("eval", str(folder), "--json")
        result = json.loads(out)
        assert (code, result["base"]["rows"]) == (0, 2)
        # B is zero in a fresh adapter: both are the same model.
        assert result["adapter"]["accuracy"] == result["base"]["accuracy"]
        assert result["adapter"]["loss"] == result["base"]["loss"]

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            ((), 2, "give a run folder, or --model"),
            (("nowhere",), 2, "nowhere: not a run folder"),
            (("--model", "MODEL"), 2, "--model needs --data"),
            (("--model", "MODEL", "--data", "missing.csv"), 3, "missing.csv"),
            (
                ("--model", "MODEL", "--data", "FILE", "--labels-from-column", "colour"),
                2,
                "did you mean 'color'?",
            ),
            (("--model", "MODEL", "--data", "FILE", "--choices", "red"), 2, "give at least two"),
            (("--model", "MODEL", "--data", "FILE", "--limit", "0"), 2, "--limit 0"),
            (("--model", "MODEL", "--data", "FILE", "--only", "adapter"), 2, "there is no adapter"),
            (("--model", "MODEL", "--data", "FILE", "--adapter", "nowhere"), 4, "nowhere: no adapter here"),
        ],
    )
    def test_mistakes(
        self, run: Run, model_folder: str, test_file: str, words: tuple[str, ...], code: int, message: str
    ) -> None:
        named = [{"MODEL": model_folder, "FILE": test_file}.get(word, word) for word in words]
        found, _, error = run("eval", *named, *PLAIN, *COLUMNS)
        assert found == code
        assert message in error
        assert error.count("\n") == 1
