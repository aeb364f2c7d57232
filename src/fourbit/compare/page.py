"""The page of a comparison, and the texts that it shares with the table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from markupsafe import Markup

from fourbit.compare.result import ArmResult, Comparison, Difference
from fourbit.compare.runner import Job
from fourbit.report import page
from fourbit.report.chart import COLOURS, Bar, Line, bar_chart, line_chart
from fourbit.report.curves import mean_of, read_curves

FILE = "comparison.html"
STATUS = {
    "finished": "",
    "no memory": "did not fit",
    "failed": "failed",
    "partly": "some seeds only",
}


def write_page(folder: Path, comparison: Comparison, jobs: Sequence[Job], settings: str) -> Path:
    """Write `comparison.html`; `settings` is the config that the arms share, as YAML."""
    done = [arm for arm in comparison.arms if arm.loss is not None]
    html = page.render(
        "compare.html",
        title=f"Comparison {folder.resolve().name}",
        folder=str(folder),
        comparison=comparison,
        rows=[(arm, cells(arm)) for arm in comparison.arms],
        status=STATUS,
        differences=by_figure(comparison),
        charts=_charts(done, jobs),
        several=len(comparison.seeds) > 1,
        settings=settings,
    )
    return page.write(folder / FILE, html)


def cells(arm: ArmResult) -> list[tuple[str, str]]:
    """(figure, what qualifies it) of one arm: loss, score, memory, time, trainable parameters."""
    if arm.loss is None:
        return [("", STATUS[arm.status]), *[("", "")] * 4]
    score = arm.score
    share = arm.trainable_parameters and arm.parameters and arm.trainable_parameters / arm.parameters
    return [
        (f"{arm.loss.value:.4f}", _interval(arm.loss.low, arm.loss.high, ".4f")),
        (f"{score.value:.1%}", _interval(score.low, score.high, ".1%")) if score else ("", ""),
        (page.gigabytes(arm.peak_bytes or 0), ""),
        (page.duration(arm.seconds or 0), f"{arm.tokens_per_second:,.0f} tok/s"),
        (f"{(arm.trainable_parameters or 0) / 1e6:,.2f} M", f"{share:.2%}"),
    ]


def by_figure(comparison: Comparison) -> list[tuple[str, list[tuple[Difference, list[tuple[str, str]]]]]]:
    """The differences in held-out loss, then those in score, each with its cells."""
    groups = groupby(comparison.differences, key=lambda item: item.figure)
    return [(figure, [(item, difference_cells(item)) for item in items]) for figure, items in groups]


def difference_cells(item: Difference) -> list[tuple[str, str]]:
    """(figure, what qualifies it): the difference, p, and the verdict."""
    p = "" if item.p is None else f"p = {item.p:.2g}"
    corrected = "" if item.adjusted is None else f"{item.adjusted:.2g} after Holm"
    return [
        (_size(item), _interval(item.low, item.high, "+.4f")),
        (p, corrected),
        (item.verdict, item.detail),
    ]


def _size(item: Difference) -> str:
    if item.relative is None:
        return f"{100 * item.difference:+.1f} points"
    return f"{item.difference:+.4f} ({item.relative:+.1%})"


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def _charts(arms: Sequence[ArmResult], jobs: Sequence[Job]) -> list[Markup]:
    colours = {arm.name: index % COLOURS + 1 for index, arm in enumerate(arms)}
    losses = [
        Bar(
            arm.name,
            arm.loss.value,
            arm.loss.low,
            arm.loss.high,
            tuple(arm.losses.values()),
            colours[arm.name],
        )
        for arm in arms
        if arm.loss is not None
    ]
    scores = [
        Bar(arm.name, 100 * arm.score.value, 100 * arm.score.low, 100 * arm.score.high,
            tuple(100 * value for value in arm.score.each), colours[arm.name])
        for arm in arms
        if arm.score is not None
    ]  # fmt: skip
    memory = [Bar(arm.name, (arm.peak_bytes or 0) / 1e9, colour=colours[arm.name]) for arm in arms]
    time = [Bar(arm.name, (arm.seconds or 0) / 60, colour=colours[arm.name]) for arm in arms]
    charts = [
        line_chart(_learning(arms, jobs, colours), "Held-out loss while training, mean over seeds"),
        bar_chart(losses, "Best held-out loss, nats per token"),
        bar_chart(scores, "Score, % of answers right"),
        bar_chart(memory, "Peak memory, GB", from_zero=True),
        bar_chart(time, "Training time, minutes", from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _learning(arms: Sequence[ArmResult], jobs: Sequence[Job], colours: dict[str, int]) -> list[Line]:
    lines = []
    for arm in arms:
        folders = [job.folder for job in jobs if job.arm.name == arm.name and job.seed in arm.losses]
        series = mean_of([read_curves(folder).heldout for folder in folders])
        lines.append(Line(arm.name, series, colours[arm.name], dots=True))
    return lines
