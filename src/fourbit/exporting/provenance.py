"""Where an artifact comes from: the chain of steps that made it, in a `provenance.json` beside it.

A step names what went in by content (SHA-256), the settings, the versions, the command that repeats it,
and what it was measured to do. A step that starts from an artifact goes on with that artifact's chain:
train, merge, export. Row texts are never part of a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fourbit
from fourbit.errors import ModelError
from fourbit.hashing import file_hash
from fourbit.limits import parse_json

FILE = "provenance.json"
#: Bytes hashed at a time.
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "gguf", "bitsandbytes")
#: What decides how a model computes; a card or a log beside it does not.
_MODEL_FILES = ("*.safetensors", "config.json", "tokenizer*.json", "tokenizer.model", "*.gguf")

#: Called with bytes hashed so far and bytes there are.
HashProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Source:
    """One input of a step: its role (base, adapter, data, ...), where it lay, and what it held."""

    role: str
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Step:
    """One link of the chain.

    kind      quantize, train, combine, merge, export
    effect    figures measured on the result, such as held-out loss before and after
    command   what repeats it, as typed in a shell
    versions  of fourbit, its code (SHA-256), Python and the libraries that computed
    """

    kind: str
    sources: tuple[Source, ...]
    settings: dict[str, Any]
    effect: dict[str, Any]
    command: str
    versions: dict[str, str]


def describe(role: str, path: str | os.PathLike[str], progress: HashProgress | None = None) -> Source:
    """The source at a path: a file, or a folder of model, adapter or data files.

    Raises ModelError if it is not there.
    """
    place = Path(path)
    if not place.exists():
        raise ModelError(f"{place}: no such file or folder")
    return Source(role, os.fspath(path), content_hash(_content_files(place), progress))


def make_step(
    kind: str,
    sources: Iterable[Source],
    settings: dict[str, Any],
    effect: dict[str, Any] | None = None,
    command: str | None = None,
) -> Step:
    """A step as of now; by default the command is this process's own."""
    return Step(kind, tuple(sources), settings, effect or {}, command or this_command(), versions())


def write(place: Path, steps: Sequence[Step]) -> Path:
    """Write the chain, the newest step last, into an artifact's folder, or beside its file."""
    path = _record(place)
    text = json.dumps({"steps": [asdict(step) for step in steps]}, indent=2, default=str)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read(place: Path) -> list[Step]:
    """The chain of an artifact; empty where it has none. Raises ModelError for a damaged record."""
    path = _record(place)
    if not path.exists():
        return []
    try:
        steps = parse_json(path.read_bytes())["steps"]
        return [
            Step(**{**step, "sources": tuple(Source(**source) for source in step["sources"])})
            for step in steps
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a valid record ({error}); remove it to go on without") from None


def content_hash(files: Sequence[Path], progress: HashProgress | None = None) -> str:
    """SHA-256 of the files' contents: of the one file itself, of several over their names and hashes."""
    total, done = sum(file.stat().st_size for file in files), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    hashes = [file_hash(file, advance) for file in files]
    if len(files) == 1:
        return hashes[0]
    lines = (f"{name.name} {value}\n" for name, value in zip(files, hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def versions() -> dict[str, str]:
    """What computes here."""
    found = {"fourbit": fourbit.__version__, "code": _code_hash(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def this_command() -> str:
    """This process's command line; of a program that uses the library, the program's."""
    name, *arguments = sys.argv
    called = "fourbit" if Path(name).name in ("fourbit", "__main__.py") else f"python {shlex.quote(name)}"
    return " ".join([called, *(shlex.quote(word) for word in arguments)])


def _record(place: Path) -> Path:
    return place.with_name(f"{place.name}.{FILE}") if place.is_file() else place / FILE


@cache
def _code_hash() -> str:
    """Of the package's sources and its native library."""
    package = Path(fourbit.__file__).parent
    files = sorted([*package.rglob("*.py"), *package.glob("fourbit_native*")])
    return content_hash(files)


def _content_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if (place / "adapter_config.json").exists():
        return [place / "adapter_config.json", *sorted(place.glob("adapter_model.*"))]
    found = sorted({file for pattern in _MODEL_FILES for file in place.glob(pattern)})
    if not found:  # a `datasets` folder
        found = sorted(file for file in place.rglob("*") if file.is_file())
    return found
