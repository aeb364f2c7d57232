"""`fourbit report`: one page about a run, in its folder."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from rich.text import Text

from fourbit.cli.common import console, print_json


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "report",
        help="write a page about a run",
        description="Write report.html into a run folder: loss curves and what they say, memory, throughput, "
        "evaluation, provenance and settings, in one file that needs no network.",
        epilog="example: fourbit report runs/demo --open",
    )
    parser.add_argument("run_folder", metavar="RUN", help="run folder of `fourbit train`")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument(
        "--with-text", action="store_true", help="also show sample answers and training rows, token by token"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page and print what the curves say."""
    from fourbit.report.findings import plain
    from fourbit.report.run import write_report

    report = write_report(Path(args.run_folder), args.with_text)
    if args.json:
        print_json({"report": str(report.path), "findings": plain(report.findings)})
    else:
        out = console()
        for finding in report.findings:
            out.print(Text(finding.text))
            for label, figure in finding.evidence.items():
                out.print(Text(f"  {label}: {figure}", "dim"))
        out.print(Text(f"wrote {report.path}"), soft_wrap=True)
    if args.open:
        webbrowser.open(report.path.resolve().as_uri())
    return 0
