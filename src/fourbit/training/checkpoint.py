"""Checkpoints: everything a run needs to go on as if it had never stopped.

checkpoints/step-000100/adapter/              PEFT's format (or the whole model under full fine-tuning)
                        optimizer.safetensors  AdamW's states, by parameter name
                        state.json             counters, guard, settings, identity, SHA-256 of every file
adapter/                                       the best so far by held-out loss, what a user keeps

Each is written aside, synced and renamed (training.durable). A checkpoint's checksums are compared with the
disk before older ones go, and again before it is used, so a damaged one is found in time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourbit.errors import TrainingError
from fourbit.evaluate import kept
from fourbit.exporting.shards import ShardWriter
from fourbit.limits import parse_json
from fourbit.optim.adamw import STATES, PagedAdamW
from fourbit.training import durable

ADAPTER = "adapter"
_FOLDER, _STATE, _OPTIMIZER = "checkpoints", "state.json", "optimizer.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
#: The whole model goes into one file, so that one rename replaces it.
_ONE_FILE = 1 << 62
#: What reading a damaged checkpoint raises.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError)


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0  # tokens seen, padding not counted
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluated_step: int = 0  # the step after which the newest evaluation ran


@dataclass
class State:
    """What a checkpoint holds beside tensors.

    guard          state of the loss guard
    metrics_bytes  length of metrics.jsonl at the time
    settings       sections model, lora, data and train of the run's settings
    identity       what the run is made of (training.identity)
    relief         settings that were changed because memory had run out
    loss_scale     state of the factor on the loss
    """

    progress: Progress
    guard: dict[str, Any]
    metrics_bytes: int
    settings: dict[str, Any]
    identity: dict[str, Any]
    relief: dict[str, Any] = field(default_factory=dict)
    loss_scale: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose checksums were right."""

    path: Path
    state: State


def save(folder: Path, model: nn.Module, optimizer: PagedAdamW, state: State, keep: int) -> Path:
    """Write a checkpoint of the run in `folder`; of the older ones the newest `keep` - 1 stay.

    Raises TrainingError when the disk refuses or gives back something else; the checkpoints before it stay.
    """
    target = folder / _FOLDER / f"step-{state.progress.step:06d}"
    with durable.disk_errors(str(target)), durable.discard_on_error(target):
        partial = durable.new_folder(target)
        save_weights(model, partial / ADAPTER)
        _save_optimizer(model, optimizer, partial)
        content = {**asdict(state), "files": durable.checksums(partial)}
        durable.write_text(partial / _STATE, json.dumps({"sha256": _digest(content), **content}, indent=2))
        durable.settle(target)
        _read_back(target)
        remove_older(target, keep)
    return target


def remove_older(path: Path, keep: int) -> None:
    """Of the checkpoints before this one leave the newest `keep` - 1; a crash may have come between."""
    found = _by_step(path.parent.parent)
    older = found[: found.index(path)]
    for old in older[: max(0, len(older) - (keep - 1))]:
        durable.remove(old)


def save_best(folder: Path, model: nn.Module) -> None:
    """Write the adapter a user keeps; a whole one is there at every moment. Raises TrainingError."""
    target = folder / ADAPTER
    with durable.disk_errors(str(target)), durable.discard_on_error(target):
        (folder / kept.FILE).unlink(missing_ok=True)  # the scores of the one that this replaces
        partial = durable.new_folder(target)
        save_weights(model, partial)
        # The one file of weights says everything; the others are the same throughout a run.
        durable.settle_files(target, last=next(partial.glob("*.safetensors")).name)


def save_weights(model: nn.Module, folder: Path) -> None:
    """The adapter in PEFT's format, or the whole model where there is no adapter."""
    options: dict[str, Any] = (
        {"save_embedding_layers": False} if isinstance(model, PeftModel) else {"max_shard_size": _ONE_FILE}
    )
    model.save_pretrained(str(folder), **options)  # type: ignore[operator]
    if isinstance(model, PeftModel):
        _sort_sets(model, folder / _ADAPTER_CONFIG)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read back what `save_weights` wrote."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")))
        return
    for file in sorted(folder.glob("*.safetensors")):
        model.load_state_dict(load_file(str(file)), strict=False)


def exists(folder: Path) -> bool:
    """Whether a run has a checkpoint, whole or damaged."""
    return bool(_by_step(folder))


def newest(folder: Path, note: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint of a run that is whole, or None where there is none at all.

    Clears up after a crash first. Each damaged checkpoint that is passed over is reported to `note` in one
    line. Raises TrainingError when all are damaged.
    """
    for path in (
        folder / ADAPTER,
        *(folder / _FOLDER / name for name in durable.settled_names(folder / _FOLDER)),
    ):
        durable.recover(path)
    found = _by_step(folder)
    for path in reversed(found):
        try:
            return Saved(path, _read_state(path))
        except (OSError, *_DAMAGE) as error:
            note(f"{path}: damaged ({error}); looking for the checkpoint before it")
    if found:
        raise TrainingError(
            f"{folder}: all {len(found)} checkpoints are damaged; restore one from a backup, "
            "or start anew with --overwrite"
        )
    return None


def recorded_compute_dtype(folder: Path) -> str | None:
    """The compute dtype of a run, from its newest checkpoint that can be read."""
    for path in reversed(_by_step(folder)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(parse_json((path / _STATE).read_bytes())["identity"]["compute_dtype"])
    return None


def restore(saved: Saved, model: nn.Module, optimizer: PagedAdamW) -> None:
    """Load weights and moments; raises TrainingError when they do not fit the model."""
    try:
        load_weights(saved.path / ADAPTER, model)
        names = {parameter: name for name, parameter in _trainable(model)}
        with safe_open(str(saved.path / _OPTIMIZER), "pt") as file:
            known = set(file.keys())

            def find(parameter: nn.Parameter, state: str) -> Tensor | None:
                key = f"{names[parameter]}/{state}"
                return file.get_tensor(key) if key in known else None  # none: no step was applied to it yet

            optimizer.write_states(find)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TrainingError(f"{saved.path}: does not fit the model ({error})") from error


def _read_state(path: Path) -> State:
    """Raises ValueError, naming the file, where a checksum is wrong."""
    content = parse_json((path / _STATE).read_bytes())
    if content.pop("sha256", None) != _digest(content):
        raise ValueError(f"{_STATE}: the checksum is wrong")
    found = durable.checksums(path)
    for name, checksum in content.pop("files").items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name] != checksum:
            raise ValueError(f"{name}: the checksum is wrong")
    return State(**{**content, "progress": Progress(**content["progress"])})


def _read_back(path: Path) -> None:
    """Raise TrainingError where the disk does not hold what was just written; that is taken away again."""
    durable.forget(path)
    try:
        _read_state(path)
    except _DAMAGE as error:
        durable.remove(path)
        raise TrainingError(
            f"{path} reads back otherwise than it was written ({error}); those before it are whole: "
            "check the disk and the memory of this machine, then go on with --resume"
        ) from error


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sort_sets(model: PeftModel, path: Path) -> None:
    """Write what PEFT keeps as a set in order: its own order changes from process to process."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    for key, value in vars(model.peft_config[model.active_adapter]).items():
        if isinstance(value, set) and isinstance(stored.get(key), list):
            stored[key] = sorted(stored[key])
    path.write_text(json.dumps(stored, indent=2, sort_keys=True), encoding="utf-8")


def _save_optimizer(model: nn.Module, optimizer: PagedAdamW, folder: Path) -> None:
    """One state after another, so that paged ones are never in memory together."""
    names = {parameter: name for name, parameter in _trainable(model)}
    writer = ShardWriter(
        folder, [f"{name}/{state}" for name in names.values() for state in STATES], _ONE_FILE
    )
    try:
        for parameter, state, value in optimizer.read_states():
            writer.add(f"{names[parameter]}/{state}", value)
        if writer.finish():
            (folder / "model.safetensors").rename(folder / _OPTIMIZER)
        else:  # before the first step
            save_file({}, str(folder / _OPTIMIZER))
    finally:
        writer.abandon()


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _by_step(folder: Path) -> list[Path]:
    """Finished checkpoints, the oldest first."""
    found = [path for path in (folder / _FOLDER).glob("step-*") if durable.is_settled(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
