"""Shell completion, as bash does it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fourbit.cli.main import COMMANDS, main

#: Calls the function that bash would, with the words typed so far.
_TYPED = (
    'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_fourbit; echo "${COMPREPLY[@]}"'
)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fourbit.cli.completion import completion
    from fourbit.cli.main import Parser

    path = tmp_path_factory.mktemp("completion") / "fourbit.bash"
    path.write_text(completion("bash", Parser(prog="fourbit"), COMMANDS))
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there to complete")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], {"train"}),
        (["train", "--res"], {"--resume"}),
        (["export", "run", "--to", "g"], {"gguf", "gptq"}),
        (["adapters", "comb"], {"combine"}),
        (["train", "sup"], {"support.yaml"}),
        (["eval", "--data", "sup"], {"support.yaml"}),
        (["train", "--no-such"], set()),
    ],
)
def test_bash(script: Path, tmp_path: Path, words: list[str], found: set[str]) -> None:
    (tmp_path / "support.yaml").touch()
    done = subprocess.run(
        ["bash", "-c", _TYPED, "bash", str(script), "fourbit", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == found
    assert not done.stderr


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef fourbit")
    assert main(["--completion", "zhs"]) == 2
    assert "no completion for 'zhs' (did you mean 'zsh'?); shells are bash" in capsys.readouterr().err
    assert main(["--completion"]) == 2
    assert "takes the name of a shell" in capsys.readouterr().err
