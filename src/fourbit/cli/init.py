"""`fourbit init`: write a config file with every setting, its meaning and its default."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fourbit.cli.common import print_json
from fourbit.config import RunConfig
from fourbit.config_file import section_class
from fourbit.errors import ConfigError

_WIDTH = 100
_HEADER = """\
# A fourbit run.
#
#   fourbit train {path} --dry-run    what would happen
#   fourbit train {path}              train
#   fourbit chat {path}               talk to the result
#
# Each setting stands below its meaning, at its default; what you leave out keeps the default.
# `--set section.key=value` overrides one for a single run.
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "init",
        help="write a commented config file to start from",
        description="Write a config file with every setting, its meaning and its default.",
        epilog="example: fourbit init support.yaml --model models/SmolLM2-135M --data tickets.jsonl",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the file to write")
    parser.add_argument("--model", help="base model: a folder, a hub name or a .gguf file")
    parser.add_argument("--data", help="training data: a file or a `datasets` folder")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the file; raises ConfigError where it exists already or cannot be written."""
    path = Path(args.config)
    values = {"model.path": args.model, "data.train": args.data}
    _write(path, config_text(path, {key: value for key, value in values.items() if value}), args.force)
    missing = [key for key, value in values.items() if not value]
    if args.json:
        print_json({"config": str(path), "missing": missing})
    else:
        first = f"fill in {' and '.join(missing)}, then " if missing else ""
        print(f"wrote {path}; {first}look at the plan with `fourbit train {path} --dry-run`")
    return 0


def config_text(path: Path, values: dict[str, str]) -> str:
    """The commented YAML; `values` maps dotted keys to what is known already.

    A required setting without a value gets a placeholder, so that the file always loads.
    """
    parts = [_HEADER.format(path=path)]
    for name, field in RunConfig.model_fields.items():
        section = section_class([name])
        if section is None:
            parts.append("\n".join(_setting(name, field, None)) + "\n")
        else:
            parts.append(_section(name, section, field.description, values))
    return "\n".join(parts)


def _section(name: str, section: type[BaseModel], note: str | None, values: dict[str, str]) -> str:
    lines = [f"# {(section.__doc__ or name).splitlines()[0]}"]
    lines += [f"# {name}: {note}"] if note else []
    lines += [f"{name}:"]
    for key, field in section.model_fields.items():
        lines += ["  " + line for line in _setting(key, field, values.get(f"{name}.{key}"))]
    return "\n".join(lines) + "\n"


def _setting(key: str, field: FieldInfo, value: str | None) -> list[str]:
    if value is None and field.is_required():
        value, comment = f"path/to/{key}", f"REQUIRED: {field.description}"
    else:
        comment = str(field.description)
    default = field.default if value is None else value
    wrapped = textwrap.wrap(comment, _WIDTH, initial_indent="# ", subsequent_indent="#   ")
    return [*wrapped, f"{key}: {_scalar(default)}"]


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _write(path: Path, text: str, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; choose another name, or --force to replace it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
