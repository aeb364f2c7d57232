"""A run: from settings to a folder with metrics, checkpoints, and the adapter a user keeps.

config.yaml      the resolved settings        summary.json   what came out, in one place
metrics.jsonl    what the settings determine  timing.jsonl   what the clock says
checkpoints/     for resuming                 adapter/       the best, in PEFT's format
provenance.json  what it is made from, here and in adapter/
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourbit.config import DataSettings, RunConfig, TrainSettings
from fourbit.config_file import dump_config, place, resolve
from fourbit.errors import ConfigError, ModelError
from fourbit.kernels import native
from fourbit.memory.measure import compact_heap, peak_bytes, release_free_memory
from fourbit.memory.show import print_plan
from fourbit.memory.sizes import size_text
from fourbit.memory.stream import hold_weights, stream_of
from fourbit.model.adapters import parameter_counts
from fourbit.model.compute import choose_device
from fourbit.nn.attention import use_tiled_attention
from fourbit.nn.fused import fuse
from fourbit.processes import join
from fourbit.training import checkpoint, durable, identity
from fourbit.training.budget import Budget, open_budget, prediction, with_choice
from fourbit.training.layout import settled
from fourbit.training.lock import check_free, hold
from fourbit.training.loop import Outcome, run_loop, steps_in_run
from fourbit.training.metrics import MetricsWriter
from fourbit.training.pace import measure_pace
from fourbit.training.prepare import check_data, prepare_data, prepare_model
from fourbit.training.progress import ProgressLine, duration_text
from fourbit.training.record import describe_sources, held_as, write_record
from fourbit.training.run_folder import check_folder, prepare_folder, with_measured_dtype
from fourbit.training.shards import check_shards
from fourbit.training.trackers import Trackers, check_installed
from fourbit.training.work import Work, autocast, make_work, share_work


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
    place(tree, settings, _SECTIONS, "fourbit.train")
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
    folder, processes = Path(config.output), join()
    console = console if processes.leads else Console(quiet=True)
    if processes.leads:
        check_folder(folder, resume, overwrite)
        check_free(folder)
        check_data(config)
        check_installed(config.train.trackers)
    check_shards(config)
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
        work = make_work(model, tokenizer, chosen, examples, heldout, Path(config.output))
        time = _predict_time(work, console)
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
    folder, processes = Path(config.output), join()
    check_shards(config)
    if config.train.shard_weights and not isinstance(model, PeftModel):
        raise ConfigError(
            "train.shard_weights shares out a frozen base; attach an adapter with fourbit.add_lora"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("nothing in this model is trainable; attach an adapter with fourbit.add_lora first")
    if not processes.leads:
        with tempfile.TemporaryDirectory(prefix="fourbit-process-") as own:
            return _fit_locked(
                model, tokenizer, config, Console(quiet=True), resume, False, budget, Path(own)
            )
    check_folder(folder, resume, overwrite)
    with hold(folder):
        return _fit_locked(model, tokenizer, config, console, resume, overwrite, budget, folder)


def _fit_locked(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    console: Console,
    resume: bool,
    overwrite: bool,
    budget: Budget | None,
    own: Path,
) -> RunResult:
    """`own` is where this process writes: the run folder, if it leads."""
    folder, processes = Path(config.output), join()
    if processes.leads:  # again: the process that held it may have written a run
        check_folder(folder, resume, overwrite)
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
    work = make_work(model, tokenizer, config, examples, heldout, own)
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
    resume_from, sources = None, []
    if processes.leads:
        resume_from = prepare_folder(folder, config, record, console, resume, overwrite)
        sources = describe_sources(_name_of(model), config.data, console)
    processes.wait()
    if resume and not processes.leads:
        resume_from = checkpoint.newest(folder, lambda _: None)
    console.print(
        f"{len(examples):,} rows to train on, {len(heldout):,} held out; {total:,} steps of "
        f"{config.train.effective_batch} rows, learning rate {work.learning_rate:g}",
        highlight=False,
    )
    if work.device.type == "cpu":
        compact_heap()
    work = share_work(processes, work, config, console)
    release_free_memory()
    done = 0 if resume_from is None else resume_from.state.progress.step
    alone = budget is not None and processes.size == 1
    time = _predict_time(work, console, (total - done) / total) if alone else {}
    trackers = Trackers(config, folder) if processes.leads else None
    metrics = MetricsWriter(own, config.train.tensorboard and processes.leads, done, trackers)
    try:
        with ProgressLine(console, total, done) as line:
            outcome = run_loop(work, metrics, line, record, resume_from)
    finally:
        metrics.close()
    processes.wait()  # until what the leading one saves is whole
    if 0 < outcome.progress.best_step < outcome.progress.step and outcome.stopped != "interrupted":
        checkpoint.load_weights(folder / checkpoint.ADAPTER, model)
    model.eval()
    release_free_memory()
    if processes.leads and not isinstance(model, PeftModel) and outcome.progress.best_step:
        # A whole model is loaded with its tokenizer.
        tokenizer.save_pretrained(str(folder / checkpoint.ADAPTER))
    summary = {**_summary(model, work, outcome), **prediction(plan), **time}
    if not processes.leads:
        return RunResult(summary, folder / checkpoint.ADAPTER, folder, outcome.stopped)
    with durable.disk_errors(str(folder / "summary.json")):
        durable.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_record([folder, folder / checkpoint.ADAPTER], config, sources, summary)
    return RunResult(summary, folder / checkpoint.ADAPTER, folder, outcome.stopped)


def _use_kernels(model: PreTrainedModel | PeftModel, config: RunConfig, console: Console) -> None:
    """Compute with our attention and our fused modules where the settings and the machine let us."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # A base that is to be shared out waits in host memory for the cards.
    device = choose_device(config.model.device) if config.train.shard_weights else base.device
    if config.train.fused and device.type == "cpu" and native.available():
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
