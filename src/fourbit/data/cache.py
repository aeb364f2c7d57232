"""Encoded rows kept on disk: made once for the same files, tokenizer and settings, and read piece by piece.

An entry is a folder, named by a hash of all that its content depends on, in `private.cache_folder()`. It is
written under a name of its own and renamed when it is whole, so two processes that make the same one both
succeed, and the second uses the first one's. `fourbit doctor --purge-caches` removes all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fourbit.config import DataSettings
from fourbit.data.encode import Encoded, Progress, encode
from fourbit.data.examples import INDEX, ROWS, Examples, ExampleWriter, Tokens
from fourbit.data.read import iter_rows, located
from fourbit.data.row import Row
from fourbit.errors import DataError
from fourbit.hashing import file_hash
from fourbit.limits import parse_json
from fourbit.private import cache_folder, owner_only

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS, _INDEX, _ROWS, _ACCOUNT = "tokens.bin", "index.bin", "rows.bin", "account.json"
_PARTIAL = ".partial"
#: Fields of `Encoded` that an entry keeps as JSON.
_ACCOUNTED = ("dropped", "forms", "rows", "cut", "parted", "note")
#: Unfinished entries of processes that were killed go when they are so old, in seconds.
_STALE = 86_400
#: Settings that say which encoded rows are used, not how rows are encoded; files are hashed by content.
_NOT_ENCODING = {"train", "heldout", "weights", "heldout_fraction", "max_rows"}
_PACKAGES = ("transformers", "tokenizers", "jinja2")


def encode_files(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    progress: Progress | None = None,
) -> tuple[Encoded, list[int]]:
    """(all rows of the files encoded, rows read of each path), from the cache where it has them.

    Where the cache cannot be written, tokens are in a file that ends with this process.

    Raises DataError as reading and encoding do, and where files change meanwhile or the disk is full.
    """
    files = _files(paths)
    seen = _stamps(files)
    folder = cache_folder() / "tokens" / _key(paths, files, tokenizer, settings)
    if (kept := _load(folder)) is not None:
        return replace(kept[0], origin="tokens from the cache"), kept[1]
    place = _new_place(folder)
    counts = [0] * len(paths)
    try:
        with _full_disk(place), open(place / _TOKENS, "w+b", opener=_private) as file:
            writer = ExampleWriter(file)
            encoded = encode(_counted(paths, settings, counts), tokenizer, settings, progress, writer)
            if _stamps(files) != seen:
                raise DataError(f"{', '.join(paths)}: changed while it was read; start again")
            _save(place, encoded, writer, counts)
        if place.parent == folder.parent:
            _settle(place, folder)
            place = folder
        kept = _load(place)
    finally:
        if place != folder:
            shutil.rmtree(place, ignore_errors=True)
    if kept is None:
        raise DataError(f"{place}: reads back otherwise than it was written; check the disk")
    return kept


def _counted(paths: Sequence[str], settings: DataSettings, counts: list[int]) -> Iterator[Row]:
    for entry, path in enumerate(paths):
        for row in iter_rows([path], settings):
            counts[entry] += 1
            yield row


def _files(paths: Sequence[str]) -> list[Path]:
    """All files that the paths stand for; those that are not there are left to the reader, which says so."""
    found: list[Path] = []
    for path in located(paths):
        found += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [file for file in found if file.is_file()]


def _stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    """What changes when a file does."""
    return [(status.st_size, status.st_mtime_ns) for status in (file.stat() for file in files)]


def _key(
    paths: Sequence[str], files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> str:
    template = str(tokenizer.chat_template or "")
    about = {
        "paths": list(map(str, paths)),
        "files": [(str(file), file_hash(file)) for file in files],
        "settings": settings.model_dump(mode="json", exclude=_NOT_ENCODING),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": template,
        # Some templates write the day into the text.
        "day": str(date.today()) if "strftime" in template else "",
        "code": [file_hash(file) for file in sorted(Path(__file__).parent.glob("*.py"))],
        "versions": [version(name) for name in _PACKAGES],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _new_place(folder: Path) -> Path:
    """A new folder beside an entry that is to be, or among temporary files where that cannot be.

    A home that cannot be written is no reason not to train.
    """
    try:
        with owner_only():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder.parent)
            return Path(tempfile.mkdtemp(prefix=f"{folder.name}-", suffix=_PARTIAL, dir=folder.parent))
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fourbit-tokens-"))


def _remove_stale(folder: Path) -> None:
    for partial in folder.glob(f"*{_PARTIAL}"):
        if time.time() - partial.stat().st_mtime > _STALE:
            shutil.rmtree(partial, ignore_errors=True)


def _save(place: Path, encoded: Encoded, writer: ExampleWriter, counts: list[int]) -> None:
    for name, array in zip((_INDEX, _ROWS), writer.arrays(), strict=True):
        with open(place / name, "wb", opener=_private) as file:
            file.write(array.tobytes())
    account = {name: getattr(encoded, name) for name in _ACCOUNTED}
    account |= {"files": writer.files(), "read": counts}
    account["checksums"] = {name: file_hash(place / name) for name in (_TOKENS, _INDEX, _ROWS)}
    text = json.dumps(account)
    with open(place / _ACCOUNT, "w", encoding="utf-8", opener=_private) as out:
        json.dump({"account": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}, out)


def _settle(place: Path, folder: Path) -> None:
    """Make a whole entry the one at `folder`, unless another process has made the same meanwhile."""
    if _load(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        try:
            place.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    shutil.rmtree(place, ignore_errors=True)


def _load(folder: Path) -> tuple[Encoded, list[int]] | None:
    """The entry there, or None where there is none or it is damaged."""
    try:
        saved = parse_json((folder / _ACCOUNT).read_bytes())
        if hashlib.sha256(saved["account"].encode()).hexdigest() != saved["sha256"]:
            return None
        account = parse_json(saved["account"])
        if account["checksums"] != {name: file_hash(folder / name) for name in (_TOKENS, _INDEX, _ROWS)}:
            return None
        index, used = np.fromfile(folder / _INDEX, INDEX), np.fromfile(folder / _ROWS, ROWS)
        examples = Examples(
            index, account["files"], Tokens((folder / _TOKENS).open("rb"), str(folder / _TOKENS))
        )
        return Encoded(examples, used, **{name: account[name] for name in _ACCOUNTED}), account["read"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def _full_disk(place: Path) -> Iterator[None]:
    """Within this block a full disk becomes one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{place}: no room for the tokens of the data ({error.strerror}); free some, or let "
            "XDG_CACHE_HOME name a folder on another disk"
        ) from None
