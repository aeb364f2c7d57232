"""The Python that llm-compressor runs in: found, made, and checked.

llm-compressor admits no transformers as new as fourbit's own, so it has a virtual environment to
itself. Its packages are listed in `workers/llmcompressor.txt`: versions that were seen to run together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fourbit.errors import ExportError
from fourbit.private import cache_folder

WORKERS = Path(__file__).parent / "workers"
REQUIREMENTS = WORKERS / "llmcompressor.txt"
#: The environment variable that names another Python with llm-compressor.
VARIABLE = "FOURBIT_LLMCOMPRESSOR"
#: Releases that the worker is written for.
LLMCOMPRESSOR = "0.14"

#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

_PROBE = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": sys.version.split()[0]}
for name in ("llmcompressor", "compressed-tensors", "transformers", "torch"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """An interpreter with llm-compressor, and the versions in it."""

    python: Path
    versions: dict[str, str]


def default_folder() -> Path:
    """Where the environment lies by default: in the user's cache."""
    return cache_folder() / "llmcompressor"


def find_environment(
    python: str | os.PathLike[str] | None = None, install: bool = False, progress: Progress | None = None
) -> Environment:
    """The environment of a given interpreter, else of FOURBIT_LLMCOMPRESSOR, else in the user's cache.

    install: make or complete the one in the user's cache where it lacks llm-compressor.
    Raises ExportError, saying what to do, where there is none or it lacks llm-compressor.
    """
    named = python or os.environ.get(VARIABLE)
    if named:
        return check_environment(Path(named))
    place = interpreter(default_folder())
    try:
        if place.exists():
            return check_environment(place)
    except ExportError:
        if not install:
            raise
    if install:
        return make_environment(progress=progress)
    raise ExportError(
        "GPTQ and AWQ need llm-compressor in an environment of its own, and there is none in "
        f"{default_folder()}: --install makes it (downloads up to 3 GB), "
        f"or set {VARIABLE} to a Python that has it"
    )


def make_environment(folder: Path | None = None, progress: Progress | None = None) -> Environment:
    """Make a virtual environment with llm-compressor, from the package index that pip is set to.

    An environment that is there already is completed. Raises ExportError with pip's reason.
    """
    folder = folder or default_folder()
    python = interpreter(folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    steps = [[sys.executable, "-m", "venv", str(folder)], [*pip, "-r", str(REQUIREMENTS)]]
    for number, command in enumerate(steps):
        if progress is not None:
            progress("environment", number, len(steps))
        done = subprocess.run(command, env=own_variables(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ExportError(f"{folder}: cannot be made an environment ({_reason(done.stderr)})")
    if progress is not None:
        progress("environment", len(steps), len(steps))
    return check_environment(python)


def check_environment(python: Path) -> Environment:
    """Ask an interpreter what it has. Raises ExportError if it does not run or lacks llm-compressor."""
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE],
            env=own_variables(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "no answer within a minute"
        raise ExportError(f"{python}: is not a Python that runs ({reason})") from None
    try:
        versions = json.loads(done.stdout)
    except ValueError:
        raise ExportError(f"{python}: is not a Python that runs ({_reason(done.stderr)})") from None
    install = f"{python} -m pip install -r {REQUIREMENTS}"
    if "llmcompressor" not in versions:
        raise ExportError(f"{python}: has no llm-compressor; {install}")
    found = versions["llmcompressor"]
    if not found.startswith(f"{LLMCOMPRESSOR}."):
        raise ExportError(f"{python}: has llm-compressor {found}, and {LLMCOMPRESSOR} is needed; {install}")
    return Environment(python, versions)


def interpreter(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def own_variables() -> dict[str, str]:
    """This process's variables without those that would lead another Python to this one's packages."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**kept, "TOKENIZERS_PARALLELISM": "false"}


def _reason(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
