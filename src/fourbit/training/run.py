"""A run: from settings to a folder with metrics, checkpoints, and the adapter a user keeps.

config.yaml      the resolved settings        summary.json   what came out, in one place
metrics.jsonl    what the settings determine  timing.jsonl   what the clock says
checkpoints/     for resuming                 adapter/       the best, in PEFT's format
provenance.json  what it is made from, here and in adapter/
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourbit.config import DataSettings, RunConfig, TrainSettings, learning_rate_for
from fourbit.config_file import dump_config, resolve
from fourbit.data.examples import Examples
from fourbit.errors import ConfigError, ModelError, nearest
from fourbit.kernels import native
from fourbit.memory.measure import compact_heap, peak_bytes, release_free_memory
from fourbit.memory.show import print_plan
from fourbit.memory.sizes import size_text
from fourbit.memory.stream import hold_weights, stream_of
from fourbit.model.adapters import parameter_counts
from fourbit.model.compute import choose_compute_dtype, choose_device
from fourbit.nn.attention import use_tiled_attention
from fourbit.nn.fused import fuse
from fourbit.training import checkpoint, durable, identity
from fourbit.training.budget import Budget, open_budget, prediction, with_choice
from fourbit.training.layout import settled
from fourbit.training.lock import check_free, hold
from fourbit.training.loop import Outcome, Work, autocast, run_loop, steps_in_run
from fourbit.training.metrics import MetricsWriter
from fourbit.training.pace import measure_pace
from fourbit.training.prepare import check_data, prepare_data, prepare_model
from fourbit.training.progress import ProgressLine, duration_text
from fourbit.training.record import describe_sources, held_as, write_record
from fourbit.training.run_folder import check_folder, prepare_folder, with_measured_dtype
from fourbit.training.trackers import Trackers, check_installed


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    metrics  final figures, the same as in summary.json
    adapter  folder of the best adapter, in PEFT's format
    folder   the run folder
    stopped  "done", "early" (no better held-out loss for a while) or "interrupted"
    """

    metrics: dict[str, Any]
    adapter: Path
    folder: Path
    stopped: str


def train(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | os.PathLike[str] | Sequence[str],
    *,
    output: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> RunResult:
    """Train what is trainable in a loaded model on a data file, into a run folder.

    model     from `fourbit.load` and `fourbit.add_lora`, or any transformers causal LM with trainable weights
    data      a file or several; form and columns as in `fourbit.config.DataSettings`
    settings  any keys of TrainSettings and DataSettings: epochs=3, learning_rate=1e-4, max_length=512, ...

    Raises ConfigError, DataError or TrainingError in one line.
    """
    tree: dict[str, Any] = {
        "model": {"path": _name_of(model), **held_as(model)},
        "data": {},
        "train": {},
        "output": os.fspath(output),
    }
    tree["data"]["train"] = [os.fspath(data)] if isinstance(data, str | os.PathLike) else list(data)
    for key, value in settings.items():
        section = next((name for name, kind in _SECTIONS.items() if key in kind.model_fields), None)
        if section is None:
            known = [field for kind in _SECTIONS.values() for field in kind.model_fields]
            raise ConfigError(f"fourbit.train: unknown setting '{key}'{nearest(key, known)}")
        tree[section][key] = value
    return fit(model, tokenizer, resolve(tree, "fourbit.train"), console or Console(), resume, overwrite)


def run(
    config: RunConfig,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    memory: int | None = None,
    predict: bool = False,
) -> RunResult:
    """Load the base, attach the adapter and train, all as the settings say.

    memory   bytes to stay below, for which micro_batch, activation_checkpointing, activation_tier,
             loss_chunk, optimizer_memory and model.weight_tier are chosen; raises
             MemoryBudgetError before the start where that cannot be
    predict  plan the memory without a budget too, refuse what exceeds the machine's, keep the plan
    """
    folder = Path(config.output)
    check_folder(folder, resume, overwrite)
    check_free(folder)
    check_data(config)
    check_installed(config.train.trackers)
    if resume:
        config = with_measured_dtype(folder, config)
    budget = open_budget(config, memory, console) if predict or memory is not None else None
    model, tokenizer = prepare_model(budget.loading(config) if budget is not None else config, console)
    return fit(model, tokenizer, config, console, resume, overwrite, budget)


def dry_run(config: RunConfig, console: Console, memory: int | None = None) -> dict[str, Any]:
    """Load and check model and data, show the resolved settings, train and write nothing."""
    console.print(dump_config(config), highlight=False, soft_wrap=True)
    check_data(config)
    budget = open_budget(config, memory, console)
    model, tokenizer = prepare_model(config, console)
    encoded, examples, heldout = prepare_data(config, tokenizer, console)
    _use_kernels(model, config, console)
    config, plan, time = settled(config, model, int(tokenizer.pad_token_id), console), None, {}
    if budget is not None:
        plan = budget.plan(examples, heldout, len(tokenizer), config.train.end_to_end)
        print_plan(plan, console)
        chosen = with_choice(config, plan.choice)
        time = _predict_time(_work(model, tokenizer, chosen, examples, heldout), console)
    trainable, total = parameter_counts(model)
    steps = steps_in_run(len(examples), config.train)
    console.print(
        f"would train {len(examples):,} rows in {steps:,} steps; nothing was written", highlight=False
    )
    return {
        "config": config.model_dump(mode="json"),
        "rows": encoded.rows,
        "dropped": encoded.dropped,
        "train_rows": len(examples),
        "heldout_rows": len(heldout),
        "tokens": encoded.tokens,
        "trained_tokens": encoded.trained_tokens,
        "steps": steps,
        "trainable_parameters": trainable,
        "parameters": total,
        **prediction(plan),
        **time,
    }


def fit(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    budget: Budget | None = None,
) -> RunResult:
    """Train a loaded model as configured. Afterwards it holds the weights that were saved as the best.

    No other process can write the run folder meanwhile, and what is written is its owner's alone.
    """
    folder = Path(config.output)
    check_folder(folder, resume, overwrite)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("nothing in this model is trainable; attach an adapter with fourbit.add_lora first")
    with hold(folder):
        return _fit_locked(model, tokenizer, config, console, resume, overwrite, budget)


def _fit_locked(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    console: Console,
    resume: bool,
    overwrite: bool,
    budget: Budget | None,
) -> RunResult:
    folder = Path(config.output)
    check_folder(folder, resume, overwrite)  # again: the process that held it may have written a run
    _, examples, heldout = prepare_data(config, tokenizer, console)
    _use_kernels(model, config, console)
    config, plan = settled(config, model, int(tokenizer.pad_token_id), console), None
    if budget is not None:
        with console.status("planning memory"):
            plan = budget.plan(examples, heldout, len(tokenizer), config.train.end_to_end)
        config = with_choice(config, plan.choice)
        if config.model.weight_tier == "device":
            hold_weights(model)
        console.print(
            f"memory: {size_text(plan.peak)} predicted, {plan.choice.text()}", highlight=False, soft_wrap=True
        )
    work = _work(model, tokenizer, config, examples, heldout)
    total = steps_in_run(len(examples), config.train)
    with console.status("reading what the run is made of"):
        record = identity.describe(
            config,
            model,
            examples,
            heldout,
            peak_rate=work.learning_rate,
            steps=total,
            autocast_dtype=work.autocast_dtype,
        )
    resume_from = prepare_folder(folder, config, record, console, resume, overwrite)
    sources = describe_sources(_name_of(model), config.data, console)
    console.print(
        f"{len(examples):,} rows to train on, {len(heldout):,} held out; {total:,} steps of "
        f"{config.train.effective_batch} rows, learning rate {work.learning_rate:g}",
        highlight=False,
    )
    if work.device.type == "cpu":
        compact_heap()
    release_free_memory()
    done = 0 if resume_from is None else resume_from.state.progress.step
    time = _predict_time(work, console, (total - done) / total) if budget is not None else {}
    metrics = MetricsWriter(folder, config.train.tensorboard, done, Trackers(config, folder))
    try:
        with ProgressLine(console, total, done) as line:
            outcome = run_loop(work, metrics, line, record, resume_from)
    finally:
        metrics.close()
    if 0 < outcome.progress.best_step < outcome.progress.step and outcome.stopped != "interrupted":
        checkpoint.load_weights(folder / checkpoint.ADAPTER, model)
    model.eval()
    release_free_memory()
    if not isinstance(model, PeftModel) and outcome.progress.best_step:
        # A whole model is loaded with its tokenizer.
        tokenizer.save_pretrained(str(folder / checkpoint.ADAPTER))
    summary = {**_summary(model, work, outcome), **prediction(plan), **time}
    with durable.disk_errors(str(folder / "summary.json")):
        durable.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_record([folder, folder / checkpoint.ADAPTER], config, sources, summary)
    return RunResult(summary, folder / checkpoint.ADAPTER, folder, outcome.stopped)


def _work(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    examples: Examples,
    heldout: Examples,
) -> Work:
    _, total = parameter_counts(model)
    rate = config.train.learning_rate
    device = next(model.parameters()).device
    return Work(
        model=model,
        train=examples,
        heldout=heldout,
        pad_id=int(tokenizer.pad_token_id),
        settings=config.train,
        learning_rate=learning_rate_for(total) if rate == "auto" else rate,
        autocast_dtype=_autocast_dtype(model, config, device),
        folder=Path(config.output),
        device=device,
    )


def _autocast_dtype(
    model: PreTrainedModel | PeftModel, config: RunConfig, device: torch.device
) -> torch.dtype | None:
    """The compute dtype where weights beside LoRA's train in fp32, so that products still run in 16 bits."""
    only_lora = all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    dtype = choose_compute_dtype(config.model.compute_dtype, choose_device(str(device))).dtype
    return None if only_lora or dtype == torch.float32 else dtype


def _use_kernels(model: PreTrainedModel | PeftModel, config: RunConfig, console: Console) -> None:
    """Compute with our attention and our fused modules where the settings and the machine let us."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if config.train.fused and base.device.type == "cpu" and native.available():
        use_tiled_attention(base)
        console.print(fuse(base).line(), highlight=False, soft_wrap=True)


def _predict_time(work: Work, console: Console, share: float = 1.0) -> dict[str, Any]:
    """Say how long this share of a run will take; what summary.json keeps is for the whole."""
    try:
        with console.status("timing a few layers"):
            pace = measure_pace(work.model, work.settings, work.train, work.heldout, lambda: autocast(work))
    except ModelError as error:
        console.print(f"time is not predicted: {error}", highlight=False, soft_wrap=True, markup=False)
        return {}
    seconds = pace.run(work.settings, work.train, work.heldout)
    console.print(f"time: about {duration_text(share * seconds)} predicted", highlight=False)
    return {"predicted_seconds": round(seconds, 3)}


def _summary(model: PreTrainedModel | PeftModel, work: Work, outcome: Outcome) -> dict[str, Any]:
    trainable, total = parameter_counts(model)
    progress = outcome.progress
    return {
        "stopped": outcome.stopped,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(outcome.seconds, 1),
        "tokens_per_second": round(outcome.tokens_per_second, 1),
        "best_step": progress.best_step,
        "heldout_loss": progress.best_loss,
        "peak_bytes": peak_bytes(work.device),
        "trainable_parameters": trainable,
        "parameters": total,
        **_streamed(model),
    }


def _streamed(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """What weights on the disk cost; nothing where all are in memory."""
    stream = stream_of(model)
    if stream is None:
        return {}
    return {
        "weights_read_bytes": stream.bytes_read,
        "weights_reading_seconds": round(stream.reading, 1),
        "weights_waiting_seconds": round(stream.waiting, 1),
    }


def _name_of(model: PreTrainedModel | PeftModel) -> str:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return str(getattr(base.config, "name_or_path", None) or "unnamed")


_SECTIONS: dict[str, type[TrainSettings] | type[DataSettings]] = {
    "train": TrainSettings,
    "data": DataSettings,
}
