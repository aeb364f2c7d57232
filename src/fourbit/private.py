"""What keeps records at home: files that only their owner can read, and libraries that do not report.

Nothing here runs at import; the `fourbit` command calls both, the library only `owner_only`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

#: What keeps dependencies from sending more than a request for what was named. Who reads it:
QUIET = {
    # huggingface_hub, and by it transformers, datasets and PEFT: no usage reports, and no versions, session
    # or environment in the headers of a download.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # The same by the name that several tools agreed on (huggingface_hub reads it, too).
    "DO_NOT_TRACK": "1",
    # datasets: no request that counts a loading.
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    # transformers: no request to a service on the hub that converts a checkpoint of pickles.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}


#: Where it is installed, bitsandbytes (which PEFT imports) and some models of transformers take compiled code
#: from the hub through it, unasked, as they are imported. Without it they use their own.
_FETCHES_CODE = "kernels"


def silence_dependencies() -> None:
    """Before dependencies are imported: switch their telemetry off, and what fetches code from the hub.

    What the user has set in the environment stays.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    sys.modules.setdefault(_FETCHES_CODE, None)  # type: ignore[arg-type]  # how Python marks what is absent


def cache_folder() -> Path:
    """Where everything lies that fourbit keeps between runs, outside of run folders."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fourbit"


def purge_caches() -> int:
    """Remove all of it; returns the bytes that it took. Raises OSError."""
    folder = cache_folder()
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    if folder.exists():
        shutil.rmtree(folder)
    return size


@contextmanager
def owner_only() -> Iterator[None]:
    """Within this block, new files and folders are their owner's alone: modes 0600 and 0700.

    The mask of file modes (umask) is the process's: it holds for its other threads and for the processes it
    starts meanwhile, too.
    """
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


@contextmanager
def open_private(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """A text file to write, its owner's alone even where a wider one is replaced. Raises OSError."""
    with os.fdopen(os.open(Path(path), os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)  # before anything is in it
        file.truncate()
        yield file


def replace_private(path: Path, text: str) -> None:
    """Write a text file that is its owner's alone, whole or not at all. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    with open_private(partial) as file:
        file.write(text)
    os.replace(partial, path)
