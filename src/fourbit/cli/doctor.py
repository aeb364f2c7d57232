"""`fourbit doctor`: what this machine and installation are, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.text import Text

from fourbit.diagnose import Finding, diagnose


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check machine and installation",
        description="Print facts about machine and installation, then what is wrong and what to do. "
        "Exits with 1 if something is.",
        epilog="example: fourbit doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print facts and problems as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; 0 if nothing is wrong, else 1."""
    finding = diagnose()
    if args.json:
        print(json.dumps(_as_json(finding), indent=2))
    else:
        _print(finding, Console(soft_wrap=True, highlight=False))
    return 1 if finding.problems else 0


def _as_json(finding: Finding) -> dict[str, Any]:
    return {
        "facts": {fact.name: fact.value for fact in finding.facts},
        "problems": [{"what": problem.what, "fix": problem.fix} for problem in finding.problems],
    }


def _print(finding: Finding, console: Console) -> None:
    width = max(len(fact.name) for fact in finding.facts)
    for fact in finding.facts:
        console.print(Text.assemble((f"{fact.name:{width}}  ", "dim"), fact.text))
    console.print()
    if not finding.problems:
        console.print(Text("nothing is wrong", "green"))
    for problem in finding.problems:
        console.print(Text.assemble(("problem  ", "bold red"), problem.what))
        console.print(Text.assemble(("fix      ", "bold"), problem.fix))
