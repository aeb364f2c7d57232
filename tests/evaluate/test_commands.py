"""`fourbit eval` and `fourbit chat` as a user runs them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from fourbit.cli.chat import Chat
from fourbit.cli.main import main
from fourbit.cli.subject import Subject
from fourbit.evaluate.generate import GREEDY
from fourbit.model.adapters import add_lora
from tests.evaluate.conftest import COLORS, build
from tests.tiny import byte_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        code = main(list(words))
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def model_folder(tmp_path: Path, learned: LlamaForCausalLM) -> str:
    folder = tmp_path / "model"
    learned.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter_folder(tmp_path: Path) -> str:
    """An adapter that changes the base so much that it answers otherwise."""
    folder = tmp_path / "adapter"
    add_lora(build("llama"), r=4, init_lora_weights=False).save_pretrained(
        str(folder), save_embedding_layers=False
    )
    return str(folder)


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
            (("--model", "MODEL", "--data", "FILE", "--with-text"), 2, "--with-text needs --output"),
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


class TestChat:
    @pytest.fixture
    def typed(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))

    def test_one_line_for_each_line(self, run: Run, typed: Any, model_folder: str) -> None:
        typed("grass?\n\nsky?\n/exit\nblood?\n")
        code, out, _ = run("chat", "--model", model_folder, *PLAIN)
        assert (code, out) == (0, "green\n\nblue\n")

    def test_switching_the_adapter(
        self, run: Run, typed: Any, model_folder: str, adapter_folder: str
    ) -> None:
        typed("snow?\n/base\nsnow?\n/adapter\nsnow?\n")
        code, out, _ = run(
            "chat", "--model", model_folder, "--adapter", adapter_folder, *PLAIN, "--max-new-tokens", "6"
        )
        lines = out.split("\n")
        assert code == 0
        assert len(lines) == 4
        assert lines[1] == "white" != lines[0] == lines[2]

    def test_bad_sampling(self, run: Run, model_folder: str) -> None:
        code, _, error = run("chat", "--model", model_folder, "--temperature", "-1")
        assert (code, "temperature is -1.0" in error) == (2, True)

    @pytest.fixture
    def chat(self, learned: LlamaForCausalLM) -> Chat:
        return Chat(Subject(learned, byte_tokenizer(), has_adapter=False), None, GREEDY, 8)

    def test_history_and_system(self, chat: Chat) -> None:
        assert "".join(chat.answer("sky?")) == "blue"
        assert [turn["content"] for turn in chat.turns] == ["sky?", "blue"]
        assert "system message set" in (chat.command("/system Be brief.") or "")
        assert (chat.system, chat.turns) == ("Be brief.", [])
        list(chat.answer("sky?"))
        text = byte_tokenizer().decode(chat._prompt())
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nsky?<|im_end|>")
        assert "no system message" in (chat.command("/system") or "")
        assert chat.command("/reset") == "conversation forgotten"
        assert "/exit" in (chat.command("/help") or "")
        assert chat.command("/base") == "there is no adapter: the base answers"
        assert chat.command("/nothing") is None

    def test_an_interrupted_answer_stays(self, chat: Chat) -> None:
        answer: Iterator[str] = chat.answer("grass?")
        assert next(answer) == "g"
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
        assert chat.turns[-1] == {"role": "assistant", "content": "g"}
        assert "".join(chat.answer("sky?")) != ""

    def test_at_a_terminal(self, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        from fourbit.cli.chat import _talk

        lines = iter(["sky?", "/hlep", "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
        out = io.StringIO()
        _talk(chat, out)
        assert out.getvalue().splitlines()[1:] == [
            "blue",
            "no command '/hlep' (did you mean '/help'?); /help lists them",
        ]

    def test_ctrl_c_stops_the_answer_only(self, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        from fourbit.cli import chat as command

        lines = iter(["grass?", KeyboardInterrupt, "sky?", EOFError])

        def typed(prompt: str) -> str:
            line = next(lines)
            if not isinstance(line, str):
                raise line
            return line

        class Impatient(io.StringIO):
            """A terminal whose user presses Ctrl-C at the second letter of the first answer."""

            pressed = False

            def write(self, text: str) -> int:
                if text == "r" and not self.pressed:
                    self.pressed = True
                    raise KeyboardInterrupt
                return super().write(text)

        monkeypatch.setattr("builtins.input", typed)
        out = Impatient()
        command._talk(chat, out)
        assert out.getvalue().splitlines()[1] == "g [stopped]"
        assert out.getvalue().endswith("\n\n")
