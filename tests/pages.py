"""What tests of HTML pages share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

#: Text that must reach a page as text.
EVIL = '<script>alert("&")</script>'


class Page(HTMLParser):
    """The text of a page and its number of charts.

    Fails on tags that are not closed in order, and on whatever runs or is fetched.
    """

    VOID = ("meta", "br", "wbr")

    def __init__(self, html: str) -> None:
        super().__init__()
        for forbidden in ("<script", "<link", "<img", "http:", "https:", "@import", "url("):
            assert forbidden not in html, forbidden
        self.open: list[str] = []
        self.text = ""
        self.charts = 0
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.charts += tag == "figure"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def write_lines(path: Path, lines: Iterable[dict[str, object]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
