"""What is compared: each arm is a name and the settings that it changes in one config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fourbit.config import RunConfig
from fourbit.config_file import load_config
from fourbit.errors import ConfigError, nearest

#: The methods that can be named, and what each one sets.
METHODS: dict[str, tuple[str, ...]] = {
    "qlora": (),
    "lora": ("model.quant_type=none",),
    "full": ("model.quant_type=none", "lora=none"),
}
#: Settings that an arm cannot change: the rows and what their loss measures, and what the runner sets.
_SHARED = ("data", "output", "train.seed", "train.tensorboard", "train.trackers")
_NEXT_SETTING = re.compile(r",(?=\s*\w+(?:\.\w+)*\s*=)")
_NAMED = re.compile(r"\s*([^:=]+?)\s*:\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Arm:
    """name: also of its folder; overrides: section.key=value, later ones win."""

    name: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=-]+", "-", self.name).strip("-.") or "arm"


def method_arms(names: Sequence[str]) -> list[Arm]:
    """The named methods. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in METHODS:
            raise ConfigError(
                f"--methods: no method '{name}'{nearest(name, METHODS)}; methods are {', '.join(METHODS)}"
            )
    return _distinct([Arm(name, METHODS[name]) for name in names])


def varied_arms(texts: Sequence[str]) -> list[Arm]:
    """Arms from texts such as "lora.r=4,lora.alpha=8" or "small: lora.r=4". Raises ConfigError."""
    arms = []
    for text in texts:
        name, settings = split_name(text)
        overrides = tuple(part.strip() for part in _NEXT_SETTING.split(settings) if part.strip())
        if name is None and not overrides:
            raise ConfigError(
                "--vary: write it as section.key=value, such as lora.r=4, or NAME: for no change"
            )
        arms.append(Arm(name if name is not None else ", ".join(overrides), overrides))
    return _distinct(arms)


def with_own_settings(arms: Sequence[Arm], settings: Mapping[str, Sequence[str]]) -> list[Arm]:
    """The arms with further overrides for some of them, by name. Raises ConfigError for an unknown name."""
    names = [arm.name for arm in arms]
    for name in settings:
        if name not in names:
            raise ConfigError(
                f"--set {name}: no arm of this name{nearest(name, names)}; arms are {', '.join(names)}"
            )
    return [Arm(arm.name, (*arm.overrides, *settings.get(arm.name, ()))) for arm in arms]


def split_name(text: str) -> tuple[str | None, str]:
    """("full", "train.epochs=2") of "full: train.epochs=2"; the name is None where there is none."""
    named = _NAMED.fullmatch(text)
    return (named[1], named[2]) if named else (None, text)


def arm_config(path: str | None, shared: Sequence[str], arm: Arm) -> RunConfig:
    """The settings of an arm: the config file, what all arms override, and the arm's own.

    Raises ConfigError for a setting that arms must share, or that is not valid.
    """
    for override in arm.overrides:
        key = override.partition("=")[0].strip()
        if any(key == shared_key or key.startswith(f"{shared_key}.") for shared_key in _SHARED):
            raise ConfigError(
                f"arm '{arm.name}': {key} must be the same for all arms; set it with --set or in the config"
            )
    try:
        config = load_config(path, [*shared, *arm.overrides])
    except ConfigError as error:
        raise ConfigError(f"arm '{arm.name}': {error}") from None
    if arm.name == "qlora" and config.model.quant_type == "none":
        raise ConfigError("arm 'qlora': model.quant_type is none; give --set \"qlora: model.quant_type=nf4\"")
    if arm.name in ("qlora", "lora") and config.lora is None:
        raise ConfigError(f"arm '{arm.name}': the config says lora: none; take that line out")
    return config


def _distinct(arms: list[Arm]) -> list[Arm]:
    folders = [arm.folder.lower() for arm in arms]
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise ConfigError(
                f"arm '{arms[index].name}' is named twice; give each a name, as in \"small: lora.r=4\""
            )
    return arms
