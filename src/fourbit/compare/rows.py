"""The rows of a comparison, split and drawn once, so that no arm and no seed sees others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourbit.config import DataSettings
from fourbit.data.encode import sample, split
from fourbit.data.forms import form_of
from fourbit.data.read import read_rows
from fourbit.data.row import Row
from fourbit.errors import ConfigError, DataError

_FILES = ("train", "heldout", "score")


@dataclass(frozen=True, slots=True)
class SharedRows:
    """The files that all arms read, and how many rows each holds.

    score   None where no answers are scored: not asked for, or plain text
    sha256  of the three files' contents together
    """

    train: Path
    heldout: Path
    score: Path | None
    counts: dict[str, int]
    sha256: str

    def settings(self, data: DataSettings) -> DataSettings:
        """The data settings of a training on these rows."""
        return data.model_copy(
            update={"train": (str(self.train),), "heldout": (str(self.heldout),), "max_rows": None}
        )


def share_rows(
    data: DataSettings,
    seed: int,
    folder: Path,
    eval_files: Sequence[str] = (),
    eval_rows: int | None = None,
) -> SharedRows:
    """Split and draw by `seed` and write train.jsonl, heldout.jsonl and score.jsonl into `folder`.

    eval_files  rows to score answers on; without them the held-out rows
    eval_rows   so many of those, drawn by seed; all of them if None, no score if 0

    Row texts are copied, so the folder is as private as the data. Raises DataError for rows that cannot be
    used, ConfigError when the folder already holds other rows.
    """
    rows = read_rows(data.train, data)
    if data.heldout:
        heldout = read_rows(data.heldout, data)
    elif data.heldout_fraction == 0:
        raise ConfigError("a comparison needs held-out rows; set data.heldout or data.heldout_fraction")
    else:
        rows, heldout = split(rows, data.heldout_fraction, seed)
    if data.max_rows is not None:
        rows = sample(rows, data.max_rows, seed)
    scored = read_rows(eval_files, data) if eval_files else heldout
    scored = [row for row in scored if form_of(row, data) != "text"]
    if eval_rows is not None:
        scored = sample(scored, eval_rows, seed)
    parts = dict(zip(_FILES, (rows, heldout, scored), strict=True))
    texts = {name: _as_lines(part) for name, part in parts.items()}
    for name, text in texts.items():
        _write(folder / f"{name}.jsonl", text)
    return SharedRows(
        folder / "train.jsonl",
        folder / "heldout.jsonl",
        folder / "score.jsonl" if scored else None,
        {name: len(part) for name, part in parts.items()},
        hashlib.sha256("\0".join(texts.values()).encode()).hexdigest(),
    )


def _as_lines(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        try:
            lines.append(json.dumps(row.fields, ensure_ascii=False) + "\n")
        except TypeError as error:
            raise DataError(
                f"{row.source}: cannot be copied into the comparison ({error}); convert the file to JSONL"
            ) from None
    return "".join(lines)


def _write(path: Path, text: str) -> None:
    try:
        if path.exists():
            if path.read_text(encoding="utf-8") != text:
                raise ConfigError(
                    f"{path}: holds other rows: data, split or drawing have changed; name another --output"
                )
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another --output") from None
