"""Charts as inline SVG: no script, no font, no file beside the page.

Horizontal places are percentages and text is sized in pixels, so that a chart fills whatever width it is
given and stays legible. Colours come from the page's style sheet (series-1 and so on), which knows light
and dark. The title of each hovered column holds its figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from fourbit.report.curves import Series

#: How many colours the style sheet has; further series begin anew.
COLOURS = 8
_HEIGHT = 230
_ROW = 34
_COLUMNS = 120  # hover columns of a line chart


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a line chart.

    colour  1 to 8
    faint   drawn thin and pale, as the raw values behind a smoothed line are
    dots    a dot at each value
    """

    name: str
    points: Series
    colour: int = 1
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a chart of estimates: a value, its interval, and what it was averaged from."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    single: tuple[float, ...] = ()
    colour: int = 1


def number(value: float) -> str:
    """A short figure: 0.0012, 1.234, 12.3, 1,234, 5e-05."""
    size = abs(value)
    if value == 0 or 1e15 > size >= 100:
        return f"{value:,.0f}"
    if size >= 1e15 or size < 1e-3:
        return f"{value:.2g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}".rstrip("0").rstrip(".")


def line_chart(
    lines: Sequence[Line],
    label: str,
    text: Callable[[float], str] = number,
    from_zero: bool = False,
    mark: tuple[float, str] | None = None,
    log_beyond: float | None = None,
) -> Markup:
    """Values over optimizer steps. Empty without values.

    mark        a horizontal line and its name
    log_beyond  a logarithmic axis where the highest value is more than so many times the lowest
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return Markup("")
    values = [value for line in drawn for _, value in line.points] + ([mark[0]] if mark else [])
    low, high = (0.0 if from_zero else min(values)), max(values)
    is_log = log_beyond is not None and low > 0 and high > log_beyond * low
    y_ticks = log_ticks(low, high) if is_log else ticks(low, high, 5)
    scale: Callable[[float], float] = math.log if is_log else float
    low, high = scale(y_ticks[0]), scale(y_ticks[-1])
    steps = sorted({step for line in drawn for step, _ in line.points})
    last = max(steps[-1], 1)

    def x(step: float) -> float:
        return 100 * step / last

    def y(value: float) -> float:
        return 100 * (high - scale(value)) / (high - low)

    parts = [_y_tick(y(tick), text(tick)) for tick in y_ticks]
    parts += [
        _x_tick(x(tick), f"{tick:,.0f}") for tick in ticks(0, last, 5) if tick <= last and tick % 1 == 0
    ]
    parts.append(Markup('<text x="100%" y="100%" dy="34" text-anchor="end">step</text>'))
    parts.append(_curves(drawn, x, y))
    if mark:
        parts.append(_mark(y(mark[0]), mark[1]))
    parts += [
        Markup('<circle class="series-{}" cx="{:.2f}%" cy="{:.2f}%" r="3.5"/>').format(
            line.colour, x(step), y(value)
        )
        for line in drawn
        if line.dots
        for step, value in line.points
    ]
    parts += _hover_columns(drawn, steps, x, text)
    svg = _svg(parts, _HEIGHT, f"{label}: {', '.join(_range(line, text) for line in drawn)}")
    legend = _legend(drawn) if len(drawn) > 1 else Markup("")
    caption = f"{label} (logarithmic)" if is_log else label
    return Markup("<figure><figcaption>{}</figcaption>{}{}</figure>").format(caption, legend, svg)


def bar_chart(
    bars: Sequence[Bar], label: str, text: Callable[[float], str] = number, from_zero: bool = False
) -> Markup:
    """Estimates under one another. From zero they are bars, else dots; a whisker is the interval."""
    if not bars:
        return Markup("")
    ends = [
        end
        for bar in bars
        for end in (bar.value, bar.low, bar.high, *bar.single)
        if end is not None and math.isfinite(end)
    ]
    low, high = (0.0 if from_zero else min(ends)), max(ends)
    x_ticks = ticks(low, high, 4)
    low, high = min(low, x_ticks[0]), max(high, x_ticks[-1])

    def x(value: float) -> float:
        return 100 * (value - low) / (high - low)

    parts = [_x_tick(x(tick), text(tick)) for tick in x_ticks]
    for index, bar in enumerate(bars):
        parts.append(_bar_row(bar, 100 * (index + 0.5) / len(bars), x, text, from_zero))
    described = ", ".join(f"{bar.name} {text(bar.value)}" for bar in bars)
    svg = _svg(parts, _ROW * len(bars), f"{label}: {described}", "bars")
    names = Markup("").join(Markup('<span title="{0}">{0}</span>').format(bar.name) for bar in bars)
    return Markup(
        '<figure><figcaption>{}</figcaption><div class="estimates">'
        '<div class="names">{}</div>{}</div></figure>'
    ).format(label, names, svg)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values from at or below low to at or above high, in about `count` steps of 1, 2 or 5."""
    if high <= low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from at or below low to at or above high; both positive."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high)) + 1
    found = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(index for index, tick in enumerate(found) if tick <= low * (1 + 1e-9))
    end = min(index for index, tick in enumerate(found) if tick >= high * (1 - 1e-9))
    return found[start : end + 1]


def _curves(lines: Sequence[Line], x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
    paths = Markup("").join(
        Markup('<polyline class="{}series-{}" points="{}"/>').format(
            "faint " if line.faint else "",
            line.colour,
            " ".join(f"{10 * x(step):.1f},{10 * y(value):.1f}" for step, value in line.points),
        )
        for line in lines
    )
    return Markup(
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{}</svg>'
    ).format(paths)


def _hover_columns(
    lines: Sequence[Line], steps: Sequence[int], x: Callable[[float], float], text: Callable[[float], str]
) -> list[Markup]:
    """Invisible columns that show a guide and, as their title, the figures nearest to them."""
    count = min(_COLUMNS, len(steps))
    centres = [steps[len(steps) * index // count] for index in range(count)]
    named = [line for line in lines if not line.faint]
    parts = []
    for index, step in enumerate(centres):
        left = 0.0 if index == 0 else (x(centres[index - 1]) + x(step)) / 2
        right = 100.0 if index == count - 1 else (x(step) + x(centres[index + 1])) / 2
        figures = [f"step {step:,}"]
        for line in named:
            nearest, value = min(line.points, key=lambda point: abs(point[0] - step))
            at = "" if nearest == step else f" (step {nearest:,})"
            figures.append(f"{line.name} {text(value)}{at}")
        parts.append(
            Markup(
                '<g class="hover"><rect x="{:.2f}%" y="0" width="{:.2f}%" height="100%"/>'
                '<line x1="{:.2f}%" x2="{:.2f}%" y1="0" y2="100%"/><title>{}</title></g>'
            ).format(left, right - left, x(step), x(step), "\n".join(figures))
        )
    return parts


def _bar_row(
    bar: Bar, middle: float, x: Callable[[float], float], text: Callable[[float], str], from_zero: bool
) -> Markup:
    parts = []
    if from_zero:
        parts.append(
            Markup(
                '<rect class="series-{}" x="0" y="{:.2f}%" width="{:.2f}%" height="14" '
                'transform="translate(0 -7)"/>'
            ).format(bar.colour, middle, x(bar.value))
        )
    if bar.low is not None and bar.high is not None:
        parts.append(
            Markup(
                '<line class="whisker series-{}" x1="{:.2f}%" x2="{:.2f}%" y1="{:.2f}%" y2="{:.2f}%"/>'
            ).format(bar.colour, x(bar.low), x(bar.high), middle, middle)
        )
    parts += [
        Markup('<circle class="single series-{}" cx="{:.2f}%" cy="{:.2f}%" r="3"/>').format(
            bar.colour, x(value), middle
        )
        for value in bar.single
    ]
    if not from_zero:
        parts.append(
            Markup('<circle class="series-{}" cx="{:.2f}%" cy="{:.2f}%" r="5"/>').format(
                bar.colour, x(bar.value), middle
            )
        )
    interval = f" [{text(bar.low)}, {text(bar.high)}]" if bar.low is not None and bar.high is not None else ""
    title = f"{bar.name}: {text(bar.value)}{interval}"
    if len(bar.single) > 1:
        title += f"\neach: {', '.join(map(text, bar.single))}"
    return Markup("<g>{}<title>{}</title></g>").format(Markup("").join(parts), title)


def _y_tick(place: float, text: str) -> Markup:
    return Markup(
        '<line class="grid" x1="0" x2="100%" y1="{0:.2f}%" y2="{0:.2f}%"/>'
        '<text x="0" y="{0:.2f}%" dx="-8" dy="4" text-anchor="end">{1}</text>'
    ).format(place, text)


def _x_tick(place: float, text: str) -> Markup:
    return Markup(
        '<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>'
        '<text x="{0:.2f}%" y="100%" dy="18" text-anchor="middle">{1}</text>'
    ).format(place, text)


def _mark(place: float, text: str) -> Markup:
    return Markup(
        '<line class="mark" x1="0" x2="100%" y1="{0:.2f}%" y2="{0:.2f}%"/>'
        '<text class="mark" x="100%" y="{0:.2f}%" dy="{2}" text-anchor="end">{1}</text>'
    ).format(place, text, 15 if place < 50 else -6)


def _legend(lines: Sequence[Line]) -> Markup:
    items = Markup("").join(
        Markup('<span><i class="{}series-{}"></i>{}</span>').format(
            "faint " if line.faint else "", line.colour, line.name
        )
        for line in lines
    )
    return Markup('<div class="legend">{}</div>').format(items)


def _range(line: Line, text: Callable[[float], str]) -> str:
    return f"{line.name} {text(line.points[0][1])} to {text(line.points[-1][1])}"


def _svg(parts: Sequence[Markup], height: int, described: str, kind: str = "lines") -> Markup:
    return Markup('<svg class="chart {}" height="{}" role="img" aria-label="{}">{}</svg>').format(
        kind, height, escape(described), Markup("").join(parts)
    )
