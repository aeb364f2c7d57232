"""Charts: what is drawn stands where it should, in well-formed SVG, and no text gets through unescaped."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from fourbit.report.chart import Bar, Line, bar_chart, line_chart, log_ticks, number, ticks
from fourbit.report.curves import mean_of, smooth, thin

EVIL = '<script>alert("&")</script>'


def parse(chart: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def percent(element: ElementTree.Element, name: str) -> float:
    return float(element.attrib[name].removesuffix("%"))


def test_a_line_runs_from_left_to_right_and_high_values_stand_high() -> None:
    chart = parse(line_chart([Line("loss", [(0, 4.0), (50, 2.0), (100, 0.0)], dots=True)], "Loss"))
    dots = list(chart.iter("circle"))
    assert [percent(dot, "cx") for dot in dots] == [0, 50, 100]
    assert [percent(dot, "cy") for dot in dots] == [0, 50, 100]
    (line,) = chart.iter("polyline")
    assert line.attrib["points"] == "0.0,0.0 500.0,500.0 1000.0,1000.0"


def test_a_logarithmic_axis_gives_equal_ratios_equal_room() -> None:
    points = [(0, 10.0), (1, 1.0), (2, 0.1)]
    chart = parse(line_chart([Line("loss", points, dots=True)], "Loss", log_beyond=8))
    assert [percent(dot, "cy") for dot in chart.iter("circle")] == pytest.approx([0, 50, 100])
    assert {"0.1", "0.2", "0.5", "1", "2", "5", "10"} <= {text.text for text in chart.iter("text")}
    plain = parse(line_chart([Line("loss", points[1:], dots=True)], "Loss", log_beyond=12))
    assert "(logarithmic)" not in ElementTree.tostring(plain, "unicode")
    assert log_ticks(0.3, 0.7) == pytest.approx([0.2, 0.5, 1])
    assert log_ticks(1, 1) == [1]


def test_ticks_are_named_and_hovering_tells_the_figures() -> None:
    chart = parse(line_chart([Line("train", [(1, 1.0), (2, 0.5)]), Line("held-out", [(2, 0.75)])], "Loss"))
    texts = [text.text for text in chart.iter("text")]
    assert {"0.5", "1", "2", "step"} <= set(texts)
    assert [title.text for title in chart.iter("title")] == [
        "step 1\ntrain 1\nheld-out 0.75 (step 2)",
        "step 2\ntrain 0.5\nheld-out 0.75",
    ]


def test_faint_lines_are_left_out_of_the_figures() -> None:
    chart = parse(line_chart([Line("raw", [(1, 1.0)], faint=True), Line("mean", [(1, 2.0)])], "Loss"))
    assert [title.text for title in chart.iter("title")] == ["step 1\nmean 2"]


def test_bars_and_whiskers() -> None:
    chart = parse(bar_chart([Bar("a", 5.0), Bar("b", 10.0, 8.0, 12.0)], "Memory", from_zero=True))
    bars = list(chart.iter("rect"))
    assert [percent(bar, "width") for bar in bars] == pytest.approx([100 * 5 / 15, 100 * 10 / 15], abs=0.01)
    whisker = next(line for line in chart.iter("line") if "whisker" in line.attrib["class"])
    assert [percent(whisker, name) for name in ("x1", "x2")] == pytest.approx([800 / 15, 80], abs=0.01)
    assert [title.text for title in chart.iter("title")] == ["a: 5", "b: 10 [8, 12]"]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-9, 1e12])
def test_one_value_alone_has_a_chart(value: float) -> None:
    assert "nan" not in line_chart([Line("x", [(1, value)], dots=True)], "X")
    assert "nan" not in bar_chart([Bar("x", value)], "X")


def test_nothing_has_no_chart() -> None:
    assert line_chart([Line("x", [])], "X") == ""
    assert bar_chart([], "X") == ""


def test_texts_are_escaped() -> None:
    for chart in (
        line_chart([Line(EVIL, [(1, 1.0)]), Line("x", [(1, 1.0)])], EVIL, mark=(1.0, EVIL)),
        bar_chart([Bar(EVIL, 1.0)], EVIL),
    ):
        assert "<script" not in chart
        assert any(EVIL in (part.text or "") for part in parse(chart).iter())


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.62, 0.71, [0.62, 0.64, 0.66, 0.68, 0.7, 0.72]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (7, 7, [6.6, 6.8, 7, 7.2, 7.4]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00005, "5e-05"), (0.0012, "0.0012"), (1.23456, "1.235"), (12.3, "12.3"), (12345, "12,345")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_series_are_smoothed_thinned_and_averaged() -> None:
    series = [(step, float(step)) for step in range(1, 101)]
    assert smooth(series, 5)[50] == (51, 51.0)
    assert smooth(series, 5)[0] == (1, 2.0)
    assert thin(series, 10)[0] == (10, 5.5)
    assert len(thin(series, 10)) == 10
    assert thin(series, 200) == series
    assert mean_of([[(1, 1.0), (2, 2.0)], [(2, 4.0), (3, 9.0)]]) == [(2, 3.0)]
