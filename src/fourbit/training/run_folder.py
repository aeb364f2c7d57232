"""The folder of a run: when it may be used, and making it ready for a fresh or a resumed run."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from fourbit.config import RunConfig
from fourbit.config_file import dump_config
from fourbit.errors import ConfigError
from fourbit.evaluate import kept
from fourbit.exporting import provenance
from fourbit.training import checkpoint, durable, identity, trackers
from fourbit.training.identity import Record
from fourbit.training.metrics import truncate

_CONFIG = "config.yaml"


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError for a folder that holds a run already, or none to resume."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name another run folder with --output")
    if (folder / "metrics.jsonl").exists() and not resume and not overwrite:
        raise ConfigError(
            f"{folder}: holds a run already; --resume goes on with it, --overwrite starts anew, "
            "--output names another"
        )
    if resume and not (folder / _CONFIG).exists():
        raise ConfigError(f"{folder}: no checkpoint to resume from")


def prepare_folder(
    folder: Path, config: RunConfig, record: Record, console: Console, resume: bool, overwrite: bool
) -> checkpoint.Saved | None:
    """Make the folder ready; returns the checkpoint to resume from, or None for a fresh start."""

    def note(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    saved = checkpoint.newest(folder, note) if resume else None
    if saved is not None:
        if differing := identity.differences(saved.state, record):
            raise ConfigError(
                f"{folder}: cannot resume, {'; '.join(differing)}; restore it, or start a new run"
            )
        for remark in identity.remarks(saved.state, record):
            note(remark)
        note(f"going on after step {saved.state.progress.step:,}")
    elif resume:
        note("the run was stopped before its first checkpoint: starting at its first step")
    with durable.disk_errors(str(folder)):
        if saved is not None:
            checkpoint.remove_older(saved.path, config.train.keep_checkpoints)
            truncate(folder, saved.state.progress.step, saved.state.metrics_bytes)
        elif resume or overwrite:
            _remove_run(folder)
        durable.write_text(folder / _CONFIG, dump_config(config))
    return saved


def with_measured_dtype(folder: Path, config: RunConfig) -> RunConfig:
    """Under "auto", the dtype that the run to be resumed measured as the faster one, not a new measure."""
    dtype = checkpoint.recorded_compute_dtype(folder)
    if config.model.compute_dtype != "auto" or dtype is None:
        return config
    model = config.model.model_copy(update={"compute_dtype": dtype})
    return config.model_copy(update={"model": model})


def _remove_run(folder: Path) -> None:
    for name in ("checkpoints", checkpoint.ADAPTER, "tensorboard", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files = ("metrics.jsonl", "timing.jsonl", "summary.json", provenance.FILE, kept.FILE, trackers.FILE)
    for name in (*files, "report.html"):
        (folder / name).unlink(missing_ok=True)
