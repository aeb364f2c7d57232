"""The scores that `fourbit eval` left in a run folder, as a table of texts.

The file may have been edited or come from another version: what is no figure is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from fourbit.report.chart import number

_DIFFERENCE = "difference"
#: Names under which the difference of two models stands, where a result has another.
_SAME = {"likeliest_label": "choice_accuracy"}
_LABELS = {"choice_accuracy": "likeliest label", "loss": "loss per token", "subject_mean": "mean of subjects"}


@dataclass(frozen=True, slots=True)
class EvaluationTable:
    """What a template shows.

    rows     which were scored, and with which settings other than the run's
    figures  by name, and in each by column: base, adapter, difference
    """

    rows: str
    columns: list[str]
    figures: dict[str, dict[str, str]]


def evaluation_table(found: Mapping[str, Any]) -> EvaluationTable:
    """What `evaluate.kept` wrote, or nothing of it."""
    table: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for column, result in found.items():
        if not isinstance(result, Mapping):
            continue
        columns.append(column)
        cells = _differences(result) if column == _DIFFERENCE else _figures(result)
        for name, text in cells:
            table.setdefault(_LABELS.get(name, name.replace("_", " ")), {})[column] = text
    rows = _listed(found.get("data")) or "the rows that the run held out"
    changed = _listed(found.get("settings"))
    return EvaluationTable(f"{rows}, with {changed}" if changed else rows, columns, table)


def _listed(value: Any) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, list) else ""


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    metrics = result.get("metrics")
    if isinstance(metrics, Mapping) and metrics:
        yield from _estimates(metrics)
        result = {name: value for name, value in result.items() if name != "accuracy"}  # one of the metrics
    yield from _estimates(result)
    for name, value in result.items():
        if _is_number(value):
            yield name, number(value)
    tasks = result.get("tasks")
    for task in tasks if isinstance(tasks, list) else ():
        if isinstance(task, Mapping) and _is_number(task.get("value")):
            error = task.get("stderr")
            spread = f" +- {number(1.96 * error)}" if _is_number(error) else ""
            yield f"{task.get('task')}, {task.get('metric')}", number(task["value"]) + spread


def _estimates(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if _is_interval(value):
            yield name, f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"


def _differences(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of proportions and scores in points of a hundred, of losses as they are."""
    for name, value in values.items():
        if not _is_interval(value):
            continue
        figures = (value["value"], value["low"], value["high"])
        middle, low, high = (f"{x:+.4f}" if name == "loss" else f"{100 * x:+.1f}" for x in figures)
        p = value.get("p")
        chance = "" if not _is_number(p) else ", p < 0.001" if p < 0.001 else f", p = {p:.3f}"
        yield _SAME.get(name, name), f"{middle} [{low}, {high}]{chance}"


def _is_interval(value: Any) -> bool:
    bounds = ("value", "low", "high")
    return isinstance(value, Mapping) and all(_is_number(value.get(name)) for name in bounds)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
