"""What two runs must have in common: every byte but the clock's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLOCK = ("seconds", "tokens_per_second", "peak_bytes")


def contents(folder: str | Path) -> dict[str, Any]:
    """Relative path to bytes of every file of a run; of what holds times or the folder's name, the rest."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }
    found["timing.jsonl"] = found["config.yaml"] = b""
    for name in ("provenance.json", "adapter/provenance.json"):  # the command and the name of the folder
        if name in found:
            found[name] = [(step["sources"], step["effect"]) for step in json.loads(found[name])["steps"]]
    summary = json.loads(found["summary.json"])
    found["summary.json"] = {key: value for key, value in summary.items() if key not in CLOCK}
    return found


def assert_same(first: str | Path, second: str | Path) -> None:
    one, two = contents(first), contents(second)
    differ = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    assert not differ, f"{first} and {second} differ in {', '.join(differ)}"
