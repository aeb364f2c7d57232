"""Settings out of a YAML file and `section.key=value` overrides, each mistake told in one line.

Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fourbit.config import (
    DataSettings,
    EvalSettings,
    LoraSettings,
    ModelSettings,
    RunConfig,
    TrainSettings,
)
from fourbit.errors import ConfigError, nearest

#: A config file has a few kilobytes; YAML is read slowly.
_LARGEST_CONFIG = 1 << 18
_brief = Repr()
_brief.maxstring = _brief.maxother = 200


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file (or start empty), apply `section.key=value` overrides, validate.

    Values of overrides are YAML: `lora.r=32`, `data.train=[a.jsonl, b.jsonl]`, `lora=none`.
    Raises ConfigError, naming file and key.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
    for override in overrides or ():
        _apply_override(tree, override)
    return resolve(tree, source=str(path) if path is not None else "settings")


def resolve(tree: dict[str, Any], source: str = "settings") -> RunConfig:
    """Validate a plain tree of settings into a RunConfig; raises ConfigError in one line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error, source)) from None


def place(
    tree: dict[str, Any], settings: Mapping[str, Any], sections: Mapping[str, type[BaseModel]], where: str
) -> None:
    """Put each setting into the section that has it; raises ConfigError for one that none has."""
    for key, value in settings.items():
        section = next((name for name, kind in sections.items() if key in kind.model_fields), None)
        if section is None:
            known = [field for kind in sections.values() for field in kind.model_fields]
            raise ConfigError(f"{where}: unknown setting '{key}'{nearest(key, known)}")
        tree[section][key] = value


def dump_config(config: RunConfig) -> str:
    """The resolved settings as YAML that `load_config` reads back to an equal RunConfig."""
    tree = config.model_dump(mode="json")
    if tree["lora"] is None:
        tree["lora"] = "none"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_CONFIG + 1)
        if len(raw) > _LARGEST_CONFIG:
            raise ConfigError(f"{path}: larger than {_LARGEST_CONFIG:,} bytes; give a config file")
        tree = _parse_yaml(raw.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such config file; `fourbit init {path}` writes one to start from"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not valid YAML (not valid UTF-8)") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{path}{where}: not valid YAML ({problem})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a config is a mapping of sections (model, lora, data, train), "
            f"not a {type(tree).__name__}"
        )
    return tree


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which can make a few lines stand for gigabytes, or for themselves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # so in its stubs
            raise yaml.composer.ComposerError(None, None, "aliases are not read; write it out", mark)
        return super().compose_node(parent, index)


def _parse_yaml(text: str) -> Any:
    """A tree of plain values. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except Exception as error:  # a date or number that is none makes its constructor raise
        raise yaml.YAMLError(f"a value is malformed: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: write it as section.key=value, such as lora.r=32")
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not valid YAML; quote it") from None
    if isinstance(value, dict):  # no single setting is a mapping: {text} is a template, as typed
        value = text
    *sections, leaf = key.strip().split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        node[section] = node = child if isinstance(child, dict) else {}
    node[leaf] = value


def _one_line(error: ValidationError, source: str) -> str:
    first, count = error.errors()[0], error.error_count()
    where = [str(part) for part in first["loc"]]
    name = ".".join(where)
    shown = _brief.repr(first["input"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(where[:-1])
        hint = nearest(where[-1], known) or f"; known are {', '.join(known)}"
        text = f"unknown key '{name}'{hint}"
    elif first["type"] == "missing":
        text = f"'{name}' is missing; {_describe(where)}"
    elif first["type"] == "value_error":
        text = f"{name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    elif first["type"] == "model_type":
        text = f"'{name}' = {shown}: must be a section with {', '.join(_known_keys(where))}"
    else:
        meaning = "" if first["type"] == "literal_error" else _meaning(where)
        text = f"'{name}' = {shown}: {_lower(str(first['msg']))}{meaning}"
    more = f" (and {count - 1} more)" if count > 1 else ""
    return f"{source}: {text}{more}"


def section_class(path: list[str]) -> type[BaseModel] | None:
    """The settings class at a dotted path of sections, or None where there is none."""
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSettings,
        "lora": LoraSettings,
        "data": DataSettings,
        "train": TrainSettings,
        "eval": EvalSettings,
    }
    if not path:
        return RunConfig
    return sections.get(path[0]) if len(path) == 1 else None


def _known_keys(path: list[str]) -> list[str]:
    owner = section_class(path)
    return list(owner.model_fields) if owner else []


def _describe(path: list[str]) -> str:
    description = _description(path)
    return f"give the {description}" if description else "add this section"


def _meaning(path: list[str]) -> str:
    description = _description(path[:2])  # beyond stand pydantic's names of the alternatives of a type
    return f" ({description})" if description else ""


def _description(path: list[str]) -> str | None:
    owner = section_class(path[:-1])
    field = owner.model_fields.get(path[-1]) if owner else None
    return field.description if field else None


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
