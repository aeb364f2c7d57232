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
        assert list(result) == ["base", "adapter", "difference"]
        assert result["base"]["accuracy"]["right"] == result["base"]["choice_accuracy"]["right"] == 4
        assert result["adapter"]["accuracy"]["right"] == 0
        assert result["base"]["loss"] < 0.1 < result["adapter"]["loss"]

    def test_table(self, run: Run, model_folder: str, test_file: str) -> None:
        code, out, _ = run(
            "eval", "--model", model_folder, "--data", test_file, *PLAIN, *COLUMNS, "--choices", "red, green"
        )
        assert code == 0
        assert "4 rows" in out
        assert "100.0% [51.0, 100.0]" in out
        assert "50.0% [15.0, 85.0]" in out
        for question, color in list(COLORS.items())[:2]:
            assert out.count(question) == 1
            assert out.count(color) == 3  # in the confusion table, as reference, and as answer

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

        # The same figures stay in the run folder, without what the rows say.
        kept = json.loads((folder / "evaluation.json").read_text())
        assert kept == {"data": [], "settings": [], **result}
        assert not {"samples", "confusions", "confusion_table"} & set(kept["base"])
        setting = "eval.max_new_tokens=4"
        assert run("eval", str(folder), "--data", test_file, "--set", setting, "--with-text")[0] == 0
        kept = json.loads((folder / "evaluation.json").read_text())
        assert (kept["data"], kept["settings"], len(kept["base"]["samples"])) == ([test_file], [setting], 3)
        # Those of another adapter are not the run's, and stay out.
        before = (folder / "evaluation.json").read_bytes()
        assert run("eval", str(folder), "--adapter", str(folder / "adapter"), "--limit", "1")[0] == 0
        assert (folder / "evaluation.json").read_bytes() == before

    def test_metrics_and_what_differs(
        self, run: Run, tmp_path: Path, model_folder: str, adapter_folder: str, test_file: str
    ) -> None:
        rows = tmp_path / "rows.jsonl"
        words = (
            "eval", "--model", model_folder, "--adapter", adapter_folder, "--data", test_file,
            *PLAIN, *COLUMNS, "--set", "eval.metrics=[exact_match, token_f1]", "--output", str(rows),
        )  # fmt: skip
        code, out, _ = run(*words)
        assert code == 0
        assert "-100.0 [-100.0, " in out
        assert " 0.125" in out  # McNemar: 2 / 2^4
        assert "intervals: Wilson; bootstrap over rows; Newcombe" in out
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        assert [line["row"] for line in lines] == [f"{test_file}:{n}" for n in range(2, 6)]
        assert list(lines[0]) == ["row", "base", "adapter"]
        assert list(lines[0]["base"]) == ["exact_match", "token_f1", "cut", "loss", "tokens"]
        assert (lines[0]["base"]["exact_match"], lines[0]["adapter"]["exact_match"]) == (1.0, 0.0)
        assert not any(text in rows.read_text() for text in (*COLORS, *COLORS.values()))
        code, out, _ = run(*words, "--with-text", "--json", "--samples", "0")
        line = json.loads(rows.read_text().splitlines()[1])
        assert (line["prompt"], line["reference"], line["base"]["answer"]) == ("sky?", "blue", "blue")
        found = json.loads(out)
        assert list(found["base"]["metrics"]) == ["exact_match", "token_f1"]
        assert found["difference"]["exact_match"]["p"] == 0.125
        assert found["difference"]["loss"]["low"] > 0

    def test_confusions(self, run: Run, tmp_path: Path, model_folder: str) -> None:
        """Few labels make a table of the answers; with many, the most frequent confusions are listed."""
        few, many = tmp_path / "few.csv", tmp_path / "many.csv"
        few.write_text("question,color\ngrass?,green\nsky?,green\nsnow?,white\nblood?,white\n")
        labels = [f"hue {n}" for n in range(13)]
        many.write_text("question,color\n" + "".join(f"sky?,{label}\n" for label in labels * 2))
        code, out, _ = run("eval", "--model", model_folder, "--data", str(few), *PLAIN, *COLUMNS)
        assert code == 0
        assert "base: answer (columns) for each reference (rows)" in out
        assert ["1", "green", "1", "\u00b7", "1"] in [line.split() for line in out.splitlines()]
        code, out, _ = run("eval", "--model", model_folder, "--data", str(many), *PLAIN, *COLUMNS)
        assert code == 0
        assert "base: most frequent confusions, by answer" in out
        assert ["hue", "0", "blue", "2"] in [line.split() for line in out.splitlines()]

    def test_multiple_choice(self, run: Run, tmp_path: Path, model_folder: str, adapter_folder: str) -> None:
        questions, examples = tmp_path / "questions.jsonl", tmp_path / "examples.jsonl"
        for path, count in ((questions, 6), (examples, 4)):
            lines = [
                {"question": f"{n}?", "choices": ["x", "y"], "answer": n % 2, "subject": "ab"[n // 2 % 2]}
                for n in range(count)
            ]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows = tmp_path / "rows.jsonl"
        words = (
            "eval", "--model", model_folder, "--adapter", adapter_folder, "--data", str(questions),
            "--multiple-choice", *PLAIN, "--set", "eval.shots=2", "--set", f"eval.shots_file={examples}",
        )  # fmt: skip
        code, out, _ = run(*words, "--output", str(rows))
        assert code == 0
        assert "6 questions, with 95 % intervals" in out
        assert "mean of 2 subjects" in out
        code, out, _ = run(*words, "--json", "--limit", "4")
        found = json.loads(out)
        assert list(found) == ["base", "adapter", "difference"]
        assert found["base"]["rows"] == 4
        assert set(found["difference"]) == {"accuracy", "subject_mean"}
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        assert len(lines) == 6
        assert list(lines[0]) == ["row", "subject", "base", "adapter"]
        assert "0?" not in rows.read_text()

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            ((), 2, "give a run folder, or --model"),
            (("--model", "MODEL", "--multiple-choice"), 2, "--multiple-choice needs --data"),
            (("--model", "MODEL", "--data", "FILE", "--multiple-choice"), 3, "needs the column 'choices'"),
            (("--model", "MODEL", "--data", "FILE", "--with-text"), 2, "--with-text needs --output, --json"),
            (("--model", "MODEL", "--data", "FILE", "--output", "no/x.jsonl"), 2, "there is no folder no"),
            (("--model", "MODEL", "--data", "FILE", "--lm-eval", "t.yaml"), 2, "goes without --data"),
            (("--model", "MODEL", "--lm-eval", "none.yaml"), 2, "none.yaml: no such task file"),
            (
                ("--model", "MODEL", "--data", "FILE", "--set", "eval.metrics=exact"),
                2,
                "unknown metric 'exact' (did you mean 'exact_match'?)",
            ),
            (
                ("--model", "MODEL", "--data", "FILE", "--set", "eval.metrics=number"),
                3,
                "test.csv:2: the metric number needs a number",
            ),
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
        columns = () if "--multiple-choice" in words else COLUMNS
        found, _, error = run("eval", *named, *PLAIN, *columns)
        assert found == code
        assert message in error
        assert error.count("\n") == 1
