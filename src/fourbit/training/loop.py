"""The training loop.

One optimizer step over an effective batch of rows: micro-batches forward and backward, each weighted
by the labelled tokens of the whole effective batch; clip; AdamW (QLoRA section 4, appendix B). Every
choice is keyed by seed, epoch and step, so that a resumed loop goes on as the uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from fourbit.config import TrainSettings
from fourbit.data.batch import effective_batches
from fourbit.data.examples import length_of
from fourbit.data.steps import batch_of, groups
from fourbit.errors import TrainingError
from fourbit.evaluate.heldout import heldout_loss
from fourbit.memory.activations import ActivationTier, checkpoint_activations
from fourbit.memory.measure import peak_bytes
from fourbit.model.adapters import key_source
from fourbit.nn.lora import LoraLinear
from fourbit.nn.loss import causal_lm_loss
from fourbit.optim import PagedAdamW
from fourbit.training import checkpoint
from fourbit.training.guard import Guard
from fourbit.training.identity import Record
from fourbit.training.interrupt import interrupt_flag
from fourbit.training.metrics import MetricsWriter
from fourbit.training.progress import ProgressLine, StepView
from fourbit.training.relief import OutOfMemory, next_relief, reason_of, relieve
from fourbit.training.repeatable import repeatable, seed_micro_batch
from fourbit.training.scaling import LossScale
from fourbit.training.schedule import learning_rate
from fourbit.training.work import Work, autocast


@dataclass(frozen=True)
class Outcome:
    """How a loop ended: `stopped` is "done", "early" (plateau) or "interrupted"."""

    progress: checkpoint.Progress
    stopped: str
    seconds: float
    tokens_per_second: float


def steps_in_run(examples: int, settings: TrainSettings) -> int:
    """Optimizer steps of a whole run."""
    per_epoch = math.ceil(examples / settings.effective_batch)
    total = max(1, math.ceil(settings.epochs * per_epoch))
    return min(total, settings.max_steps) if settings.max_steps else total


def run_loop(
    work: Work,
    metrics: MetricsWriter,
    line: ProgressLine,
    record: Record,
    resume_from: checkpoint.Saved | None = None,
) -> Outcome:
    """Train to the end, a plateau, or an interrupt; leaves checkpoints and the best adapter in the folder.

    record  what checkpoints say of the run's settings and of what it is made of
    """
    settings, model = work.settings, work.model
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    total = steps_in_run(len(work.train), settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    memory = settings.optimizer_memory
    optimizer = PagedAdamW(
        parameters,
        work.learning_rate,
        (settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        bits=8 if settings.optimizer == "adamw_8bit" else 32,
        memory=None if memory is None else memory << 20,
        folder=work.folder,
    )
    progress, guard = checkpoint.Progress(), Guard()
    relief: dict[str, Any] = {}
    scaled: dict[str, Any] = {}
    if resume_from is not None:
        checkpoint.restore(resume_from, model, optimizer)
        state = resume_from.state
        progress, guard = state.progress, Guard(state.guard)
        relief, scaled = state.relief, state.loss_scale
    scale = LossScale(work.autocast_dtype or base.dtype, scaled)
    first_step, first_tokens = progress.step, progress.tokens

    def save() -> None:
        if not work.processes.leads:
            return
        # Metrics first: a checkpoint on the disk must find there all lines that came before it.
        made_of = metrics.sync(), record.settings, record.identity
        state = checkpoint.State(progress, guard.state(), *made_of, relief, scale.state())
        checkpoint.save(work.folder, model, optimizer, state, settings.keep_checkpoints)

    def go_on_with(changes: dict[str, Any], why: str) -> Work:
        relief.update(changes)
        line.note(f"{why}: going on with " + ", ".join(f"{key} {value}" for key, value in changes.items()))
        return replace(work, settings=relieve(work.settings, changes, base, optimizer, tier))

    if settings.activation_checkpointing:
        checkpoint_activations(base)
    train_mode(model)
    began = time.monotonic()
    with (
        interrupt_flag() as interrupted,
        repeatable(work.device, settings.deterministic),
        ActivationTier(base, settings.activation_tier, work.folder) as tier,
    ):
        if relief:
            work = go_on_with(relief, "memory ran out before")
        if _is_evaluation_due(progress, settings, total):  # an interrupt came before it
            _evaluate(work, progress, metrics, line)
            save()
        stopped = "early" if _is_plateau(progress, settings, total) else "done"
        for step, rows in _steps(work, first_step, total) if stopped == "done" else ():
            rate = learning_rate(step, total, work.learning_rate, settings.warmup_ratio, settings.schedule)
            step_began = time.monotonic()
            while True:
                try:
                    taken = _optimizer_step(
                        work, optimizer, parameters, guard, scale, step, rows, rate, interrupted
                    )
                    break
                except OutOfMemory as error:
                    why = f"step {step + 1}: {error}"
                changes = next_relief(work.settings, work.device.type == "cpu")
                if changes is None:
                    raise TrainingError(
                        f"{why}; nothing is left to give up: lower data.max_length, or lora.r, and start anew"
                    )
                work = go_on_with(changes, why)
            if taken is None:
                save()
                stopped = "interrupted"
                break
            loss, grad_norm, tokens, warning = taken
            progress.step, progress.tokens = step + 1, progress.tokens + tokens
            if warning is not None:
                line.note(warning)
            elapsed = time.monotonic() - began
            view = StepView(
                progress.step,
                total,
                loss,
                rate,
                grad_norm,
                tokens_per_second=(progress.tokens - first_tokens) / elapsed,
                seconds_left=elapsed / (progress.step - first_step) * (total - progress.step),
                peak_bytes=peak_bytes(work.device),
            )
            line.show(view)
            metrics.write(
                progress.step,
                {"loss": loss, "learning_rate": rate, "grad_norm": grad_norm, "tokens": progress.tokens},
                {
                    "seconds": time.monotonic() - step_began,
                    "tokens_per_second": view.tokens_per_second,
                    "peak_bytes": view.peak_bytes,
                },
            )
            due = _is_evaluation_due(progress, settings, total)
            stop = work.processes.any(interrupted())
            if due and not stop:
                _evaluate(work, progress, metrics, line)
            if due or stop:
                save()
            if due and not stop:
                if _is_plateau(progress, settings, total):
                    stopped = "early"
                    break
                stop = work.processes.any(interrupted()) and progress.step < total
            if stop:
                stopped = "interrupted"
                break
    optimizer.close()
    seconds = metrics.seconds_before + time.monotonic() - began
    return Outcome(progress, stopped, seconds, progress.tokens / seconds)


def _is_evaluation_due(progress: checkpoint.Progress, settings: TrainSettings, total: int) -> bool:
    step = progress.step
    return progress.evaluated_step < step and (step % settings.eval_every == 0 or step == total)


def _is_plateau(progress: checkpoint.Progress, settings: TrainSettings, total: int) -> bool:
    patience = settings.early_stop_patience
    return patience is not None and progress.evaluations_since_best >= patience and progress.step < total


def _steps(work: Work, first: int, total: int) -> Iterator[tuple[int, list[int]]]:
    """(step, training rows of its effective batch) from `first` on; seed and epoch alone decide the order."""
    settings = work.settings
    per_epoch = math.ceil(len(work.train) / settings.effective_batch)
    for epoch in range(first // per_epoch, math.ceil(total / per_epoch)):
        batches = effective_batches(
            work.train, settings.effective_batch, settings.seed, epoch, settings.group_by_length
        )
        for index, rows in enumerate(batches):
            step = epoch * per_epoch + index
            if first <= step < total:
                yield step, rows


def _optimizer_step(
    work: Work,
    optimizer: PagedAdamW,
    parameters: list[nn.Parameter],
    guard: Guard,
    scale: LossScale,
    step: int,
    rows: list[int],
    rate: float,
    interrupted: Callable[[], bool],
) -> tuple[float, float, int, str | None] | None:
    """(mean loss per labelled token, gradient norm before clipping, tokens seen, warning or None).

    None after an interrupt between two micro-batches: the step is given up and has changed nothing, since
    who sends SIGTERM may not wait for the end of a long step. Raises OutOfMemory, likewise.
    """
    while True:
        losses: list[float] | None = None
        shortage = None
        try:
            losses = _add_gradients(work, step, rows, scale.factor, interrupted)
        except (RuntimeError, MemoryError) as error:
            shortage = reason_of(error)
            if shortage is None:
                raise
            if work.processes.together:  # the others wait inside the step for what this one would send
                raise TrainingError(
                    f"step {step + 1}: {shortage} in process {work.processes.rank}; lower train.micro_batch"
                ) from None
        if work.processes.any(shortage is not None) and shortage is None:
            shortage = "memory ran out in another process"
        if shortage is not None:  # raised here, since the error above holds on to the tensors of its frames
            raise OutOfMemory(shortage)
        if losses is None:
            optimizer.zero_grad(set_to_none=True)
            return None
        loss = sum(work.processes.merged(losses))
        work.processes.sum_gradients(parameters)
        scale.take_off(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, work.settings.max_grad_norm).item()
        if math.isfinite(grad_norm):
            scale.count()
            break
        if not math.isfinite(loss) or not scale.lower():
            break
        optimizer.zero_grad(set_to_none=True)
    apply, warning = guard.check(step, loss, grad_norm, [work.train[row].source for row in rows])
    if apply:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, sum(length_of(work.train, row) for row in rows), warning


def _add_gradients(
    work: Work, step: int, rows: list[int], factor: float, interrupted: Callable[[], bool]
) -> list[float] | None:
    """Each micro-batch's part of the mean loss per labelled token, zero for those of other processes.

    Its gradients, times a factor, are left in the weights. None: interrupted.
    """
    # Position 0 predicts nothing before it, so a label there carries no loss.
    labelled = max(1, sum(sum(work.train[row].trained[1:]) for row in rows))
    keys = key_source(work.model)
    computed = groups(rows, work.train, work.settings)
    losses = [0.0] * len(computed)
    for turn, (index, group, counts) in enumerate(work.processes.turns(computed)):
        if turn > 0 and work.processes.size == 1 and interrupted():  # several stop together, after the step
            return None
        batch = batch_of([work.train[row] for row in group], work.pad_id, work.settings).to(work.device)
        seed_micro_batch(work.settings.seed, step, index)
        if keys is not None:
            keys.set(work.settings.seed, step, batch.rows, batch.position_ids)
        with autocast(work):
            loss_sum, _ = causal_lm_loss(work.model, batch, work.settings.loss_chunk)
        (loss_sum / labelled * (factor if counts else 0.0)).backward()
        if counts:
            losses[index] = loss_sum.item() / labelled
    if keys is not None:
        keys.clear()
    return losses


def _evaluate(work: Work, progress: checkpoint.Progress, metrics: MetricsWriter, line: ProgressLine) -> None:
    """Held-out loss; keeps the adapter when it is the best so far. Without held-out rows the last is kept."""
    progress.evaluated_step = progress.step
    if not work.heldout:
        _save_best(work)
        progress.best_step = progress.step
        return
    began = time.monotonic()
    work.model.eval()
    with autocast(work):
        result = heldout_loss(
            work.model,
            work.heldout,
            work.pad_id,
            chunk=work.settings.loss_chunk,
            processes=work.processes,
        )
    train_mode(work.model)
    better = progress.best_loss is None or result.loss < progress.best_loss
    if better:
        progress.best_loss, progress.best_step, progress.evaluations_since_best = (
            result.loss,
            progress.step,
            0,
        )
        _save_best(work)
    else:
        progress.evaluations_since_best += 1
    metrics.write(progress.step, {"heldout_loss": result.loss}, {"heldout_seconds": time.monotonic() - began})
    line.note(f"step {progress.step}: held-out loss {result.loss:.4f}{' (best so far)' if better else ''}")


def _save_best(work: Work) -> None:
    if work.processes.leads:
        checkpoint.save_best(work.folder, work.model)


def train_mode(model: nn.Module) -> None:
    """Training mode, with dropout in adapters only: the frozen base's own dropout is not keyed."""
    model.train()
    adapter_dropouts = {
        id(d) for m in model.modules() if isinstance(m, LoraLinear) for d in m.lora_dropout.values()
    }
    for module in model.modules():
        if isinstance(module, nn.Dropout) and id(module) not in adapter_dropouts:
            module.eval()
