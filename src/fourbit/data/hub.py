"""Data sets on the Hugging Face hub, by their usual address: hf://datasets/OWNER/NAME[@REVISION][/PATH].

Only such an address leads to the hub: a path that is mistyped is never sent anywhere. Files come into the
hub's own cache and are read from there like any others; nothing of a data set is executed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fourbit.errors import DataError

PREFIX = "hf://datasets/"
_ADDRESS = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<path>.+?))?/?")
#: Documents that describe a data set, and are none of its rows.
_ABOUT = ("readme", "license", "licence", "citation", "changelog")


def places(path: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """The path itself, or of an address the files it stands for, downloaded where they are not yet.

    Of a data set's files, or those below the address's path, those of the split `train` are taken where names
    part it from others, else all.

    suffixes  of files that hold rows

    Raises DataError for an address that is none, for files of several folders, and for what the hub refuses.
    """
    text = str(path)
    if not text.startswith("hf:"):
        return [Path(path)]
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise DataError(f"{text}: write a data set on the hub as {PREFIX}OWNER/NAME, or with /FILE after it")
    name, revision, inner = match["name"], match["revision"], match["path"] or ""
    chosen = _choose(text, _listed(name, revision), inner, suffixes)
    return [_downloaded(name, revision, file) for file in chosen]


def _choose(address: str, files: Sequence[str], inner: str, suffixes: Sequence[str]) -> list[str]:
    if inner in files:
        return [inner]
    below = [file for file in files if not inner or file.startswith(inner.rstrip("/") + "/")]
    found = [file for file in below if file.lower().endswith(tuple(suffixes)) and not _is_about(file)]
    if not found:
        where = f"no file or folder {inner}" if not below else f"no files of {' '.join(suffixes)}"
        raise DataError(f"{address}: {where} in this data set; it has {', '.join(files[:8]) or 'no files'}")
    train = [file for file in found if "train" in re.split(r"[^a-z]+", file.lower())] or found
    folders = sorted({str(PurePosixPath(file).parent) for file in train})
    if len(folders) > 1:
        raise DataError(
            f"{address}: has rows in the folders {', '.join(folders[:8])}; name one: "
            f"{address.rstrip('/')}/{PurePosixPath(folders[0]).relative_to(inner or '.')}"
        )
    return sorted(train)


def _is_about(file: str) -> bool:
    return PurePosixPath(file).name.lower().startswith(_ABOUT) or PurePosixPath(file).name.startswith(".")


def _listed(name: str, revision: str | None) -> list[str]:
    """The files of a data set, by the hub, or without a network those that were downloaded before."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return sorted(HfApi().list_repo_files(name, revision=revision, repo_type="dataset"))
    except GatedRepoError:
        raise DataError(f"{name}: gated; accept its licence on the hub, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{name}: no such data set on the hub (private ones need `hf auth login`); check the name"
        ) from None
    except Exception:  # no network, in the words of whichever library found out
        pass
    try:
        folder = snapshot_download(name, revision=revision, repo_type="dataset", local_files_only=True)
    except (LocalEntryNotFoundError, OSError):
        raise DataError(
            f"{name}: not downloaded yet, and the hub cannot be reached; try again with a network"
        ) from None
    return sorted(file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file())


def _downloaded(name: str, revision: str | None, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision, repo_type="dataset"))
    except Exception as error:  # the hub's, the network's and the disk's
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{PREFIX}{name}/{file}: cannot be downloaded ({reason}); try again") from None
