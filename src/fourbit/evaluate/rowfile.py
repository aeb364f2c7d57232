"""The rows' scores as a file, so that two evaluations can be compared row by row.

One JSON object a line and row, with one entry for each model scored:

    {"row": "test.csv:2", "base": {"exact_match": 0.0, ...}, "adapter": {"exact_match": 1.0, ...}}

The rows' texts are private data as often as not: they are left out unless asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fourbit.errors import ConfigError
from fourbit.evaluate.choice import ChoiceResult
from fourbit.evaluate.result import EvalResult
from fourbit.private import open_private


def check_writable(path: str | Path) -> None:
    """Raise ConfigError for a path at which no file can be written, before hours of work."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give a file such as {path / 'scores.jsonl'}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; create it first")


def write_rows(
    path: str | Path, results: Mapping[str, EvalResult | ChoiceResult], with_text: bool = False
) -> None:
    """Write the rows of results by model name, all of the same rows; ConfigError if that is impossible."""
    lines = zip(*(_rows(name, result, with_text) for name, result in results.items()), strict=True)
    try:
        with open_private(path) as file:
            for parts in lines:
                merged: dict[str, Any] = {}
                for part in parts:
                    merged |= part
                file.write(json.dumps(merged, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _rows(name: str, result: EvalResult | ChoiceResult, with_text: bool) -> Iterator[dict[str, Any]]:
    if isinstance(result, ChoiceResult):
        columns = zip(result.questions, result.answers, result.right, result.confidence, strict=True)
        for question, answer, right, confidence in columns:
            kept: dict[str, Any] = {"row": question.source, "subject": question.subject}
            if with_text:
                kept |= {"prompt": question.text, "reference": question.letters[question.answer]}
            yield {**kept, name: {"right": right, "answer": answer, "confidence": confidence}}
        return
    for row in result.row_scores:
        texts = {"prompt": row.prompt, "reference": row.reference} if with_text else {}
        yield {"row": row.source, **texts, name: row.to_dict(with_text)}
