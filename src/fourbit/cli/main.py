"""The `fourbit` command: one module per subcommand, imported only when it is the one that runs.

Exit codes: 0 done, 1 failed, 2 settings or arguments, 3 data, 4 model or adapter, 5 quantization,
6 training, 7 verification, 8 export, 9 memory, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from importlib import import_module
from typing import NoReturn

from fourbit import __version__
from fourbit.errors import ConfigError, FourBitError, nearest
from fourbit.private import owner_only, silence_dependencies

COMMANDS = {
    "init": "write a commented config file to start from",
    "data": "show what will be trained on, token by token",
    "plan": "say what memory a run will take, and what fits a budget",
    "train": "fine-tune a model as a config file says",
    "eval": "score a model, and its adapter beside it",
    "chat": "talk to a model or a finished run",
    "adapters": "list adapters, or combine several into one",
    "merge": "put an adapter into its base's weights",
    "export": "write a run for a serving engine",
    "compare": "train several ways on the same rows, and say which differences count",
    "report": "write a page about a run",
    "quantize": "write a model as a 4-bit checkpoint",
    "verify": "compare a merge or export with the adapter it came from",
    "doctor": "say what this machine and this installation can do",
}
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, as all of fourbit's are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` shows how")


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one line on standard error, never in a traceback."""
    # Threads that wait for one another should spin briefly, then sleep: spinning on wastes the core that a
    # neighbour has put the awaited thread off, sleeping at once is slower on an idle machine
    # (docs/log.md). Must be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    silence_dependencies()
    # PEFT imports bitsandbytes where it is installed, which then warns of parts that fourbit never uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    argv = sys.argv[1:] if argv is None else argv
    name = next((word for word in argv if not word.startswith("-")), None)
    if argv[:1] == ["--completion"]:
        return _complete(argv[1:])
    if name not in COMMANDS:
        return _without_command(argv, name)
    parser = Parser(prog="fourbit")
    subparsers = parser.add_subparsers(dest="command")
    import_module(f"fourbit.cli.{name}").add_parser(subparsers)
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ConfigError(f"unknown argument '{unknown[0]}'; `fourbit {name} --help` lists them")
        with owner_only():
            return int(args.run(args))
    except FourBitError as error:
        print(f"fourbit {name}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"fourbit {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _complete(shells: list[str]) -> int:
    from fourbit.cli.completion import completion

    try:
        if len(shells) != 1:
            raise ConfigError("--completion takes the name of a shell, such as bash")
        print(completion(shells[0], Parser(prog="fourbit"), COMMANDS))
    except FourBitError as error:
        print(f"fourbit: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _without_command(argv: list[str], name: str | None) -> int:
    lines = [f"  {command:<10} {text}" for command, text in COMMANDS.items()]
    usage = "usage: fourbit COMMAND ...\n\n" + "\n".join(lines) + "\n\n`fourbit COMMAND --help` says more. "
    usage += "`fourbit --completion bash` (zsh, tcsh) prints what completes them.\n"
    if argv == ["--version"]:
        print(f"fourbit {__version__}")
        return 0
    if name is None and argv in ([], ["--help"], ["-h"]):
        print(usage, end="")
        return 0
    problem = f"no command '{name}'{nearest(name, COMMANDS)}" if name else f"unknown option '{argv[0]}'"
    print(f"fourbit: error: {problem}; commands are {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
