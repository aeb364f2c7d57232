"""The folder of a run: when it may be used, and what must agree for it to be resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

from fourbit.config import RunConfig, dump_config, load_config
from fourbit.errors import ConfigError
from fourbit.exporting import provenance
from fourbit.training import checkpoint
from fourbit.training.metrics import truncate_after


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError for a folder that holds a run already, or none to resume."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name another run folder with --output")
    if (folder / "metrics.jsonl").exists() and not resume and not overwrite:
        raise ConfigError(
            f"{folder}: holds a run already; --resume goes on with it, --overwrite starts anew, "
            "--output names another"
        )
    if resume and checkpoint.newest(folder) is None:
        raise ConfigError(f"{folder}: no checkpoint to resume from")


def prepare_folder(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> Path | None:
    """Make the folder ready; returns the checkpoint to resume from, or None for a fresh start."""
    newest = checkpoint.newest(folder) if resume else None
    if overwrite and folder.exists():
        for name in ("checkpoints", checkpoint.ADAPTER, "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.jsonl", "timing.jsonl", "summary.json", provenance.FILE):
            (folder / name).unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made ({error.strerror}); name another run folder with --output"
        ) from None
    if newest is not None:
        stored = load_config(folder / "config.yaml")
        changed = _differences(stored, config)
        if changed:
            raise ConfigError(
                f"{folder}: cannot resume, {changed[0]} differs from the run's; "
                "restore it, or start a new run"
            )
        truncate_after(folder, checkpoint.read_progress(newest).step)
        return newest
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return None


def _differences(stored: RunConfig, config: RunConfig) -> list[str]:
    old, new = stored.model_dump(), config.model_dump()
    changed = []
    for section in ("model", "lora", "data", "train"):
        if old[section] is None or new[section] is None:
            changed += [section] if old[section] != new[section] else []
            continue
        changed += [f"{section}.{key}" for key in new[section] if old[section][key] != new[section][key]]
    return [key for key in changed if key != "train.tensorboard"]
