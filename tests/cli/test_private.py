"""Nothing leaves the machine and what stays is its owner's alone: every command, the network cut off."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit as package
from fourbit.cli.main import COMMANDS, main
from fourbit.private import QUIET, open_private, owner_only
from tests.cli.offline import FAST, MARKER, SLOW
from tests.exporting.gguf.models import byte_level, model

SCRIPT = Path(__file__).with_name("offline.py")
WORDS = ("red", "blue", "green", "black", "white", "pink", "gray", "gold")
#: What shows rows because that was asked for, and the rows themselves.
ASKED = {"rows.jsonl", "rows.html", "train.jsonl", "heldout.jsonl", "score.jsonl"}

TASK = """\
task: rows
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: [red, blue]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def cut_off() -> list[str]:
    """What starts a command in a network of its own, without a way out; empty where that is not permitted."""
    for words in (["unshare", "-rn"], ["unshare", "-n"]):
        try:
            done = subprocess.run([*words, "true"], capture_output=True, check=False)
        except OSError:
            break
        if done.returncode == 0:
            return words
    return []


def skip_unless_cut_off() -> None:
    """After all else has been checked: whether the commands ran without a network, or only asked for none."""
    if not cut_off():
        pytest.skip("passed, but with a network: this system lets nobody cut it off (unshare -n)")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that every format can hold, and rows that say the marker twice."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = byte_level()
    model("llama", len(tokenizer)).to(torch.bfloat16).save_pretrained(str(folder / "model"))
    tokenizer.save_pretrained(str(folder / "model"))
    rows = [{"prompt": f"{MARKER} {n}?", "completion": f"{MARKER} {WORDS[n % 8]}"} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(TASK)
    return folder


def run_offline(inputs: Path, folder: Path, *options: str) -> tuple[list[list[Any]], list[str]]:
    """(command, exit code and last words of each; addresses that anything asked for)."""
    for name in ("model", "rows.jsonl", "task.yaml"):
        if not (folder / name).exists():
            (folder / name).symlink_to(inputs / name)
    roots = f"{Path(package.__file__).parents[1]}{os.pathsep}{Path(__file__).parents[2]}"
    kept = {key: value for key, value in os.environ.items() if key not in (*QUIET, "HF_HUB_OFFLINE")}
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HOME": str(folder / "cache" / "huggingface")}
    done = subprocess.run(
        [*cut_off(), sys.executable, str(SCRIPT), str(folder), *options],
        env={**kept, **caches, "PYTHONPATH": roots},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return found["returned"], found["asked"]


def wider_than_their_owner(folder: Path) -> list[str]:
    """Files and folders below one that anyone else may read, inputs left out."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o077
    ]


def saying(text: str, folder: Path) -> set[str]:
    """Names of files below a folder that hold a text, between tags of a page or not."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if text.encode() in content or text.encode() in re.sub(rb"<[^>]*>", b"", content):
                found.add(path.name)
    return found


@pytest.fixture(scope="module")
def offline(
    inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[Any]], list[str]]:
    """The folder that the commands left, and what `run_offline` says."""
    folder = tmp_path_factory.mktemp("offline")
    folder.chmod(0o755)
    return folder, *run_offline(inputs, folder)


class TestWithoutANetwork:
    def test_every_command_passes_and_asks_for_nothing(self, offline: Any) -> None:
        _, returned, asked = offline
        assert [each for each in returned if each[1] != 0 and each[0] != "doctor"] == []
        assert len(returned) == len(FAST)
        assert asked == []
        assert {words[0] for words in (*FAST, *SLOW)} == set(COMMANDS)
        skip_unless_cut_off()

    def test_what_is_written_is_its_owners_alone(self, offline: Any) -> None:
        folder, _, _ = offline
        written = {path.name for path in folder.iterdir()}
        assert written >= {"run", "packed", "merged", "run.gguf", "lora.gguf", "nf4", "combined", "rows.html"}
        assert wider_than_their_owner(folder) == []

    def test_only_what_was_asked_for_says_what_rows_say(self, offline: Any) -> None:
        """Metrics, TensorBoard, evaluation, report, records and model cards among what does not."""
        folder, _, _ = offline
        assert list((folder / "run" / "tensorboard").iterdir())
        assert (folder / "run" / "report.html").exists()
        assert saying(MARKER, folder) == {"rows.html"}

    def test_texts_come_when_asked_for(self, offline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, _, _ = offline
        monkeypatch.chdir(folder)
        assert main(["eval", "run", "--with-text", "--only", "adapter", "--limit", "2"]) == 0
        assert saying(MARKER, folder / "run") == {"evaluation.json"}
        assert main(["report", "run", "--with-text"]) == 0
        assert saying(MARKER, folder / "run") == {"evaluation.json", "report.html"}
        assert wider_than_their_owner(folder) == []


@pytest.mark.slow
def test_commands_that_start_others_pass_without_a_network(inputs: Path, tmp_path: Path) -> None:
    returned, asked = run_offline(inputs, tmp_path, "--slow")
    assert [each for each in returned if each[1] != 0 and each[0] != "doctor"] == []
    assert len(returned) == len(FAST) + len(SLOW)
    assert (tmp_path / "cache" / "fourbit" / "runtime.json").exists()
    assert asked == []
    assert wider_than_their_owner(tmp_path) == []
    # lm-eval reads its data through `datasets`, which keeps them in its cache.
    assert {name for name in saying(MARKER, tmp_path) if not name.endswith(".arrow")} <= ASKED
    skip_unless_cut_off()


def test_the_command_switches_telemetry_off(tmp_path: Path) -> None:
    """In the command and before its imports; `import fourbit` leaves the environment alone."""
    program = (
        "import os, fourbit\n"
        f"names = {sorted(QUIET)}\n"
        "print([name in os.environ for name in names])\n"
        "from fourbit.cli.main import main\n"
        "main(['--version'])\n"
        "from importlib.util import find_spec\n"
        "from huggingface_hub import constants\n"
        "off = constants.HF_HUB_DISABLE_TELEMETRY\n"
        "print(off, os.environ['HF_UPDATE_DOWNLOAD_COUNTS'], find_spec('kernels'))\n"
    )
    (tmp_path / "kernels.py").write_text("raise SystemExit('this would take code from the hub')")
    kept = {key: value for key, value in os.environ.items() if key not in QUIET}
    environment = {**kept, "PYTHONPATH": f"{Path(package.__file__).parents[1]}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    before, _, after = done.stdout.splitlines()
    assert before == str([False] * len(QUIET))
    assert after == "True 0 None"


def test_files_are_their_owners_alone_within_the_block_only(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    mask = os.umask(0o022)
    try:
        with owner_only():
            (tmp_path / "in").mkdir()
            (tmp_path / "in" / "file").touch()
        (tmp_path / "after").touch()
        with open_private(tmp_path / "after") as file:
            assert mode(tmp_path / "after") == 0o600
            file.write("new")
        (tmp_path / "later").touch()
    finally:
        assert os.umask(mask) == 0o022
    assert [mode(tmp_path / name) for name in ("in", "in/file", "after", "later")] == [
        0o700,
        0o600,
        0o600,
        0o644,
    ]
    assert (tmp_path / "after").read_text() == "new"
