"""`fourbit COMMAND ...`: find the command's file, run it, turn a user's error into one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import fourbit
from fourbit.errors import FourBitError, nearest

#: Each is a module of this package with `add_parser(subparsers)`, which sets `run(args) -> exit code`.
COMMANDS = ("init", "train", "eval", "chat", "quantize", "doctor")
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2 for wrong usage, 130 for Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments).parse_args(arguments)
    try:
        code: int = args.run(args)
    except FourBitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return code


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fourbit",
        description="Fine-tune language models in 4 bits (QLoRA).",
        epilog="example: fourbit train --model models/SmolLM2-135M --data tickets.jsonl",
    )
    parser.add_argument("--version", action="version", version=f"fourbit {fourbit.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    named = next((word for word in arguments if not word.startswith("-")), None)
    if named is not None and named not in COMMANDS:
        parser.error(f"unknown command '{named}'{nearest(named, COMMANDS)}; known: {', '.join(COMMANDS)}")
    for command in (named,) if named else COMMANDS:
        import_module(f"fourbit.cli.{command}").add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
