"""The newest scores of a run, kept in its folder, where `fourbit report` finds them.

What `fourbit eval --json` prints, by model, the files of the rows and what `--set` changed:

    {"data": ["test.csv"], "settings": [], "base": {...}, "adapter": {...}, "difference": {...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourbit.errors import ConfigError
from fourbit.private import replace_private

FILE = "evaluation.json"


def keep(folder: Path, found: Mapping[str, Any], data: Sequence[str], settings: Sequence[str]) -> Path:
    """Replace the scores in a run folder by these, whole or not at all.

    found     by model, and the difference, as plain values
    data      files of the rows; empty where the run held them out
    settings  `key=value` of those that are not the run's

    Raises ConfigError where that cannot be written.
    """
    path = folder / FILE
    record = {"data": list(data), "settings": list(settings), **found}
    try:
        replace_private(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{path}: the scores cannot be kept ({error.strerror}); make the run folder writable"
        ) from None
    return path
