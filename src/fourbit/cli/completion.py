"""`fourbit --completion SHELL`: a script with which a shell completes commands, options and paths."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from importlib import import_module

from fourbit.errors import ConfigError, nearest

#: What arguments are called that take a file or a folder.
_PATHS = (
    *("config.yaml", "data", "file", "file.jsonl", "task.yaml"),
    *("adapter", "artifact", "folder", "model", "out", "output", "run"),
)


def completion(shell: str, parser: argparse.ArgumentParser, commands: Iterable[str]) -> str:
    """The script for a parser to which these commands are added. Raises ConfigError for another shell."""
    import shtab

    known = shtab.SUPPORTED_SHELLS
    if shell not in known:
        raise ConfigError(
            f"no completion for '{shell}'{nearest(shell, known)}; shells are {', '.join(known)}"
        )
    subparsers = parser.add_subparsers(dest="command")
    for name in commands:
        import_module(f"fourbit.cli.{name}").add_parser(subparsers)
    _complete_paths(parser, shtab.FILE)
    return str(shtab.complete(parser, shell))


def _complete_paths(parser: argparse.ArgumentParser, how: object) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, how)
        elif action.nargs != 0 and str(action.metavar or action.dest).lower() in _PATHS:
            action.complete = how  # type: ignore[attr-defined]
