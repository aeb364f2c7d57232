"""What a person sees of a step, in terminals of any width and in a file."""

import io

import pytest
from rich.console import Console

from fourbit.training.progress import ProgressLine, StepView

VIEW = StepView(1234, 2200, 11.234, 2e-4, 0.53, 1359.0, 2725.0, 31_260_000_000)
FIGURES = ("1234/2200", "11.234", "2.0e-04", "0.53", "1,359 tok/s", "45:25 left", "31.26 GB")


@pytest.mark.parametrize("width", [80, 105, 106, 200])
def test_a_terminal_shows_every_figure_whatever_its_width(width):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    with ProgressLine(console, 2200) as line:
        line.show(VIEW)
    for figure in FIGURES:
        assert figure in screen.getvalue()
    assert ("━" in screen.getvalue()) == (width >= 106)


def test_a_file_gets_the_first_and_the_last_step_and_notes():
    file = io.StringIO()
    with ProgressLine(Console(file=file, width=80), 3) as line:
        for step in (1, 2, 3):
            line.show(StepView(step, 3, 1.0, 1e-4, 1.0, 100.0, 3.0, 1_000_000_000))
        line.note("held-out loss 1.0")
    lines = file.getvalue().splitlines()
    assert [text.split()[1] for text in lines[:2]] == ["1/3", "3/3"]
    assert lines[2:] == ["held-out loss 1.0"]


def test_hours_are_shown_as_hours():
    view = StepView(1, 2, 1.0, 1e-4, 1.0, 1.0, 3 * 3600 + 4 * 60 + 5.4, 1)
    assert "3:04:05 left" in view.text()
