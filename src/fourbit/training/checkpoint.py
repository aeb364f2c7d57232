"""Checkpoints: trained weights, optimizer states and counters, written aside and renamed into place.

checkpoints/step-000100/adapter/              PEFT's format (or the whole model under full fine-tuning)
                        optimizer.safetensors  AdamW's moments, by parameter name
                        state.json             counters
adapter/                                       the best so far by held-out loss, what a user keeps
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourbit.errors import TrainingError
from fourbit.exporting.folder import replace

_KEEP = 2
ADAPTER = "adapter"


@dataclass
class Progress:
    """Where a run is: what a checkpoint must know beside weights and optimizer."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0  # tokens seen, padding not counted
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write a checkpoint of the run in `folder`; all but the newest two are removed."""
    target = folder / "checkpoints" / f"step-{progress.step:06d}"
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(model, partial / ADAPTER)
    save_file(_optimizer_tensors(model, optimizer), str(partial / "optimizer.safetensors"))
    (partial / "state.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    replace(partial, target)
    for old in sorted(_finished(folder))[:-_KEEP]:
        shutil.rmtree(old)
    return target


def save_best(folder: Path, model: nn.Module) -> None:
    """Write the adapter a user keeps, replacing the one before."""
    partial = folder / f"{ADAPTER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_weights(model, partial)
    replace(partial, folder / ADAPTER)


def save_weights(model: nn.Module, folder: Path) -> None:
    """The adapter in PEFT's format, or the whole model where there is no adapter."""
    options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    model.save_pretrained(str(folder), **options)  # type: ignore[operator]


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read back what `save_weights` wrote."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")))
        return
    for file in sorted(folder.glob("*.safetensors")):
        model.load_state_dict(load_file(str(file)), strict=False)


def newest(folder: Path) -> Path | None:
    """The newest finished checkpoint of a run, or None."""
    return max(_finished(folder), default=None)


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load weights, moments and counters; raises TrainingError when they do not fit the run."""
    try:
        load_weights(checkpoint / ADAPTER, model)
        moments = load_file(str(checkpoint / "optimizer.safetensors"))
        for name, parameter in _trainable(model):
            state = {
                key.removeprefix(f"{name}/"): value
                for key, value in moments.items()
                if key.startswith(f"{name}/")
            }
            if state["exp_avg"].shape != parameter.shape:
                raise ValueError(f"'{name}' has another shape")
            optimizer.state[parameter] = state
        return read_progress(checkpoint)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TrainingError(
            f"{checkpoint}: cannot be resumed from ({error}); were the settings changed?"
        ) from error


def read_progress(checkpoint: Path) -> Progress:
    """The counters of a checkpoint."""
    return Progress(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in _trainable(model)
        for key, value in optimizer.state[parameter].items()
    }


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _finished(folder: Path) -> list[Path]:
    return [path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".partial"]
