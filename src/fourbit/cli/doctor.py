"""`fourbit doctor`: what this machine and installation are, and what is wrong with them."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.text import Text

from fourbit.cli.common import console, print_json
from fourbit.diagnose import Finding, diagnose
from fourbit.errors import ConfigError
from fourbit.memory.sizes import size_text
from fourbit.private import cache_folder, purge_caches


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check machine and installation",
        description="Print facts about machine and installation, then what is wrong and what to do. "
        "Exits with 1 if something is. --purge-caches does nothing but empty fourbit's caches.",
        epilog="example: fourbit doctor --json",
    )
    parser.add_argument(
        "--purge-caches",
        action="store_true",
        help="remove what fourbit keeps between runs outside of run folders; it is made again when needed",
    )
    parser.add_argument("--json", action="store_true", help="print facts and problems as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; 0 if nothing is wrong, else 1."""
    if args.purge_caches:
        return _purge(args.json)
    finding = diagnose()
    if args.json:
        print_json(_as_json(finding))
    else:
        _print(finding, console())
    return 1 if finding.problems else 0


def _purge(as_json: bool) -> int:
    folder = cache_folder()
    try:
        size = purge_caches()
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: cannot be removed ({error.strerror or error})"
        ) from None
    if as_json:
        print_json({"purged": str(folder), "bytes": size})
    else:
        console().print(f"removed {folder}: {size_text(size)}", highlight=False, soft_wrap=True)
    return 0


def _as_json(finding: Finding) -> dict[str, Any]:
    return {
        "facts": {fact.name: fact.value for fact in finding.facts},
        "problems": [{"what": problem.what, "fix": problem.fix} for problem in finding.problems],
    }


def _print(finding: Finding, out: Console) -> None:
    width = max(len(fact.name) for fact in finding.facts)
    for fact in finding.facts:
        out.print(Text.assemble((f"{fact.name:{width}}  ", "dim"), fact.text), soft_wrap=True)
    out.print()
    if not finding.problems:
        out.print(Text("nothing is wrong", "green"))
    for problem in finding.problems:
        out.print(Text.assemble(("problem  ", "bold red"), problem.what), soft_wrap=True)
        out.print(Text.assemble(("fix      ", "bold"), problem.fix), soft_wrap=True)
