"""Experiment trackers beside the run folder: wandb, MLflow and trackio, through accelerate's wrappers.

None is imported unless a run names it. They get the curves and the settings of model, adapter and training;
nothing of the data. A tracker that fails while a run trains is given up with one line, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fourbit.config import RunConfig, TrainSettings
from fourbit.errors import ConfigError
from fourbit.training import durable

#: Where a resumed run finds what its trackers call it.
FILE = "trackers.json"
_PROJECT = "fourbit"


def check_installed(names: Iterable[str]) -> None:
    """Raise ConfigError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")


def libraries_of(settings: TrainSettings) -> list[str]:
    """What a run imports for its curves, as far as it is installed."""
    named = [*settings.trackers, *(["torch.utils.tensorboard"] if settings.tensorboard else [])]
    return [name for name in named if find_spec(name.rpartition(".")[2]) is not None]


class Trackers:
    """The trackers that a run names, told what is logged."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Raises ConfigError where one cannot be started."""
        names = config.train.trackers
        check_installed(names)
        self._started: dict[str, Any] = {}
        if not names:
            return
        ids = _known_ids(folder)
        for name in names:
            try:
                known = ids.get(name)
                self._started[name], ids[name] = _start(name, folder, known)
                if known is None:  # MLflow refuses settings that change, as what was measured may
                    self._started[name].store_init_configuration(_shown(config))
            except Exception as error:  # of as many classes as there are trackers
                self.close()
                raise ConfigError(f"train.trackers: {name} did not start: {_first_line(error)}") from error
        durable.write_text(folder / FILE, json.dumps(ids, indent=2) + "\n")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send what are numbers."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for name in list(self._started):
            try:
                self._started[name].log(numbers, step=step)
            except Exception as error:
                del self._started[name]
                _notice("step %d: %s gets nothing more of this run: %s", step, name, _first_line(error))

    def close(self) -> None:
        for name, tracker in self._started.items():
            try:
                tracker.finish()
            except Exception as error:
                _notice("%s did not end its run: %s", name, _first_line(error))


def _start(name: str, folder: Path, run_id: str | None) -> tuple[Any, str]:
    """A tracker at work, and what it calls the run: `run_id`, where it knew the run before."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's own loggers ask for it
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    label = folder.resolve().name
    if name == "mlflow":
        tracker = kind(_PROJECT, run_id=run_id, run_name=label)
        tracker.start()
        return tracker, str(tracker.tracker.info.run_id)
    if name == "wandb":
        run_id = run_id or secrets.token_hex(8)
        tracker = kind(_PROJECT, name=label, id=run_id, resume="allow", dir=str(folder))
    else:
        run_id = run_id or f"{label}-{secrets.token_hex(4)}"
        tracker = kind(_PROJECT, name=run_id, resume="allow")
    tracker.start()
    return tracker, run_id


def _known_ids(folder: Path) -> dict[str, str]:
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: is not a JSON object; remove it, and trackers begin a new run")
    return {str(key): str(value) for key, value in found.items()}


def _shown(config: RunConfig) -> dict[str, Any]:
    """Settings as one level of names; of the model's path the last part."""
    tree = config.model_dump(mode="json", include={"model", "lora", "train"})
    tree["model"]["path"] = Path(config.model.path).name
    flat = {f"{name}.{key}": value for name, part in tree.items() for key, value in (part or {}).items()}
    return {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in flat.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _notice(text: str, *parts: object) -> None:
    logging.getLogger("fourbit").warning(text, *parts)
