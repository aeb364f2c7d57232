"""`fourbit chat` as a user runs it: piped, at a terminal, and by its commands."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM

from fourbit.cli import slash
from fourbit.cli.chat import talk
from fourbit.errors import ConfigError, DataError
from fourbit.evaluate.conversation import Conversation
from fourbit.model.adapter_set import AdapterSet
from fourbit.model.load import load
from tests.evaluate.conftest import Run
from tests.tiny import byte_tokenizer

PLAIN = ("--set", "model.quant_type=none", "--set", "model.compute_dtype=float32")
Typed = Callable[[str], None]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.fixture
def chat(learned: LlamaForCausalLM) -> Conversation:
    return Conversation(AdapterSet(learned), byte_tokenizer(), max_new_tokens=8)


@pytest.fixture
def pair(model_folder: str, adapter_folder: str) -> Conversation:
    base, tokenizer = load(model_folder, quant_type="none", compute_dtype="float32")
    adapters = AdapterSet(base)
    adapters.add("other", adapter_folder)
    return Conversation(adapters, tokenizer, max_new_tokens=8)


class TestPipe:
    def test_one_line_for_each_line(self, run: Run, typed: Typed, model_folder: str) -> None:
        """Each a conversation of its own; nothing is a command."""
        typed("grass?\n\nsky?\n/quit\nsky?\n")
        code, out, error = run("chat", "--model", model_folder, *PLAIN, "--max-new-tokens", "9")
        lines = out.split("\n")
        assert (code, error) == (0, "")
        assert [*lines[:3], lines[4:]] == ["green", "", "blue", ["blue", ""]]

    def test_json(self, run: Run, typed: Typed, model_folder: str, adapter_folder: str) -> None:
        typed("snow?\n\nsky?")
        code, out, _ = run(
            "chat", "--model", model_folder, "--adapter", f"x={adapter_folder}", *PLAIN,
            "--max-new-tokens", "6", "--json", "--compare",
        )  # fmt: skip
        first, empty, second = (json.loads(line) for line in out.splitlines())
        assert code == 0
        assert first["prompt"] == "snow?"
        assert first["answers"]["base"] == {"text": "white", "tokens": 5, "stopped": True}
        assert first["answers"]["x"]["text"] != "white"
        assert empty == {"prompt": "", "answers": {}}
        assert second["answers"]["base"]["text"] == "blue"

    def test_one_prompt(self, run: Run, typed: Typed, model_folder: str) -> None:
        typed("two\nlines")
        code, out, _ = run("chat", "--model", model_folder, *PLAIN, "--one-prompt", "--json")
        assert code == 0
        assert json.loads(out)["prompt"] == "two\nlines"

    def test_who_answers(self, run: Run, typed: Typed, model_folder: str, adapter_folder: str) -> None:
        words = (
            "chat",
            "--model",
            model_folder,
            "--adapter",
            adapter_folder,
            *PLAIN,
            "--max-new-tokens",
            "6",
        )
        answers = []
        for more in ((), ("--use", "base"), ("--use", Path(adapter_folder).parent.name), ("--compare",)):
            typed("snow?\n")
            code, out, _ = run(*words, *more)
            assert code == 0
            answers.append(out)
        assert answers[1] == "white\n" != answers[0] == answers[2]
        assert answers[3] == f"base: white\n{Path(adapter_folder).parent.name}: {answers[0]}"

    def test_a_run(
        self, run: Run, typed: Typed, tmp_path: Path, model_folder: str, adapter_folder: str
    ) -> None:
        """Its adapter and system message, and a second adapter beside it."""
        folder = tmp_path / "runs" / "one"
        folder.mkdir(parents=True)
        model = {"path": model_folder, "quant_type": "none", "compute_dtype": "float32"}
        settings = {"model": model, "data": {"train": "x.csv", "system": "Hm."}, "output": str(folder)}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        code, _, error = run("chat", str(folder))
        assert (code, "the run has no adapter yet; finish it" in error) == (4, True)
        (folder / "adapter").symlink_to(adapter_folder)
        typed("snow?\n")
        code, out, _ = run(
            "chat", str(folder / "config.yaml"), "--adapter", f"two={adapter_folder}", "--compare", "--json",
            "--max-new-tokens", "5",
        )  # fmt: skip
        answers = json.loads(out)["answers"]
        assert (code, list(answers)) == (0, ["base", "one", "two"])
        assert answers["one"] == answers["two"] != answers["base"]

    def test_a_run_of_full_fine_tuning(
        self, run: Run, typed: Typed, tmp_path: Path, model_folder: str
    ) -> None:
        """It keeps a whole model where others keep an adapter."""
        folder = tmp_path / "whole"
        folder.mkdir()
        model = {"path": "gone", "quant_type": "none", "compute_dtype": "float32"}
        settings = {"model": model, "data": {"train": "x.csv"}, "lora": "none"}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        (folder / "adapter").symlink_to(model_folder)
        typed("snow?\n")
        assert run("chat", str(folder))[:2] == (0, "white\n")

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            ("--temperature -1", 2, "temperature is -1.0"),
            ("--min-p 2", 2, "min_p is 2.0"),
            ("--max-new-tokens 0", 2, "--max-new-tokens 0: give at least 1"),
            ("--compare", 2, "there is no adapter to compare with"),
            ("--use other", 2, "no adapter 'other'; there are base"),
            ("--adapter nowhere", 4, "nowhere: no adapter here"),
            ("--adapter base=ADAPTER", 2, "the adapter name 'base' is the base's"),
            ("--adapter x=ADAPTER --adapter x=ADAPTER", 2, "the adapter name 'x' is given twice"),
        ],
    )
    def test_mistakes(
        self,
        run: Run,
        typed: Typed,
        model_folder: str,
        adapter_folder: str,
        words: str,
        code: int,
        message: str,
    ) -> None:
        typed("sky?\n")
        more = words.replace("ADAPTER", adapter_folder).split()
        found, out, error = run("chat", "--model", model_folder, *PLAIN, *more)
        assert (found, out) == (code, "")
        assert message in error
        assert error.count("\n") == 1


class TestTerminal:
    @pytest.fixture
    def session(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
        def play(chat: Conversation, *lines: Any, out: io.StringIO | None = None) -> list[str]:
            """What is printed, and before it what stood in front of each line typed."""
            left, screen = iter([*lines, EOFError]), out or io.StringIO()

            def typed(prompt: str) -> str:
                screen.write(prompt)
                line = next(left)
                if not isinstance(line, str):
                    raise line
                screen.write(f"{line}\n")
                return line

            monkeypatch.setattr("builtins.input", typed)
            talk(chat, screen)
            return screen.getvalue().splitlines()[1:]

        return play

    def test_answers_errors_and_leaving(self, chat: Conversation, session: Any) -> None:
        lines = session(chat, "sky?", "", "/hlep", "/set top_p 3", "/quit", "never read")
        assert lines == [
            "base> sky?",
            "blue",
            "base> ",
            "base> /hlep",
            "no command '/hlep' (did you mean '/help'?); /help lists them",
            "base> /set top_p 3",
            "top_p is 3.0, must be above 0 and at most 1",
            "base> /quit",
        ]

    def test_comparing(self, pair: Conversation, session: Any) -> None:
        lines = session(pair, "/compare on", "sky?", "/use base", "grass?", "/compare off", "blood?")
        assert lines[:5] == [
            "other> /compare on",
            "base, other all answer; the conversation goes on from other's answer",
            "all> sky?",
            "[base]",
            "blue",
        ]
        assert lines[5] == "[other*]"
        assert "[base*]" in lines
        assert "[other]" in lines
        assert lines[-3] == "base> blood?"

    def test_every_cut_answer_is_marked(self, pair: Conversation, session: Any) -> None:
        lines = session(pair, "/compare", "/set max_new_tokens 1", "sky?")
        assert lines[5:7] == ["[base]", "b [cut: /set max_new_tokens]"]

    def test_retry_and_a_cut_answer(self, chat: Conversation, session: Any) -> None:
        lines = session(chat, "/set max_new_tokens=2", "grass?", "/retry")
        assert lines[3] == "gr [cut: /set max_new_tokens]"
        assert lines[5].startswith("temperature is 0: the same model gives the same answer")
        assert lines[6] == lines[3]
        assert len(chat.turns) == 2

    def test_too_long_a_conversation(self, chat: Conversation, session: Any) -> None:
        lines = session(chat, "x" * 600, "sky?")
        assert lines[2].startswith("the conversation has 6")
        assert lines[-2] == "blue"

    def test_ctrl_c_stops_the_answer_only(self, chat: Conversation, session: Any) -> None:
        class Impatient(io.StringIO):
            """A terminal whose user presses Ctrl-C at the second letter of the first answer."""

            pressed = False

            def write(self, text: str) -> int:
                if text == "r" and not self.pressed:
                    self.pressed = True
                    raise KeyboardInterrupt
                return super().write(text)

        lines = session(chat, "grass?", KeyboardInterrupt, "sky?", out=Impatient())
        assert lines[1] == "g [stopped]"
        assert lines[-3].endswith("base> sky?")
        assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
        assert chat.turns[1]["content"] == "gr"

    def test_ctrl_c_while_the_model_reads(
        self, pair: Conversation, session: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The adapters are on again, the question is dropped, and the next answer is right."""
        from fourbit.evaluate import generate

        read, calls = generate.next_tokens, []

        def pressed(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return read(*args)

        monkeypatch.setattr(generate, "next_tokens", pressed)
        pair.use("base")
        lines = session(pair, "sky?", "grass?")
        assert lines[1] == " [stopped]"
        assert lines[3].startswith("green")
        assert [turn["content"] for turn in pair.turns[:1]] == ["grass?"]


class TestCommands:
    def test_help_names_them_all(self, chat: Conversation) -> None:
        text = slash.run(chat, "/help").text
        assert [line.split()[0] for line in text.splitlines()[: len(slash.COMMANDS)]] == list(slash.COMMANDS)
        assert set(slash.COMMANDS) == {
            "/help", "/system", "/set", "/reset", "/undo", "/retry", "/save", "/load", "/adapters", "/use",
            "/compare", "/quit",
        }  # fmt: skip

    def test_what_they_say_and_do(self, pair: Conversation, tmp_path: Path) -> None:
        def say(line: str) -> str:
            return slash.run(pair, line).text

        for _ in pair.answer("sky?"):
            pass
        file = tmp_path / "chat.jsonl"
        assert say(f"/save {file}") == f"1 question and its answer written to {file}"
        assert say("/undo") == "last question and answer forgotten; 0 questions and their answers left"
        assert say(f"/load {file}") == f"1 question and its answer read from {file}"
        assert say("/system Be brief.") == "system message set, conversation forgotten"
        assert (pair.system, pair.turns) == ("Be brief.", [])
        assert say("/system") == "no system message, conversation forgotten"
        assert pair.system is None
        assert say("/adapters") == "  base\n* other"
        assert say("/use base") == "base answers from now on"
        assert say("/compare") == "base, other all answer; the conversation goes on from base's answer"
        assert say("/compare") == "only base answers"
        assert say("/set temperature 0.5") == "temperature 0.5"
        assert "temperature 0.5\ntop_p 1\ntop_k 0\nseed 0" in say("/set")
        assert say("/reset") == "conversation forgotten"
        assert slash.run(pair, "/quit").leave

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/us other", "no command '/us'"),
            ("/use", "no adapter ''; there are base, other"),
            ("/set temperature", "write it as /set NAME VALUE"),
            ("/set heat 3", "no setting 'heat'"),
            ("/compare maybe", "give on or off"),
            ("/save", "say where"),
            ("/load", "say which"),
            ("/load nowhere.jsonl", "cannot be read"),
            ("/undo", "nothing to undo"),
            ("/reset now", "/reset takes nothing behind it"),
        ],
    )
    def test_mistakes(self, pair: Conversation, line: str, message: str) -> None:
        with pytest.raises((ConfigError, DataError)) as error:
            slash.run(pair, line)
        assert message in str(error.value)

    def test_nothing_to_compare(self, chat: Conversation) -> None:
        with pytest.raises(ConfigError, match="no adapter to compare with"):
            slash.run(chat, "/compare on")
