"""One training and its score, in a process of its own, which leaves `outcome.json` in the run folder.

Its own process, so that peak memory is its own, and so that running out of memory ends it alone.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fourbit.config import RunConfig
from fourbit.config_file import resolve
from fourbit.errors import FourBitError

SPEC, OUTCOME = "arm.json", "outcome.json"
#: How allocators say that there is no more memory, each in its own exception.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "failed to map segment",
    "cannot allocate memory",
    "std::bad_alloc",
    "out of memory",
)

#: Makes a progress display for a named piece of work: report(stage, done, total).
ShowProgress = Callable[[str, Console], AbstractContextManager[Callable[[str, int, int], None]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one arm ended with one seed.

    status          finished, no memory, failed or interrupted
    reason          of any but finished, one line
    heldout_loss    of the best evaluation, nats per token
    right           whether each scored row's answer is right, in order; None where none were scored
    peak_bytes      of the training
    seconds         of steps and evaluations, whatever interruptions lay between
    """

    status: str
    reason: str = ""
    heldout_loss: float | None = None
    best_step: int = 0
    steps: int = 0
    tokens: int = 0
    right: list[bool] | None = None
    peak_bytes: int = 0
    seconds: float = 0.0
    score_seconds: float = 0.0
    trainable_parameters: int = 0
    parameters: int = 0


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Leave an outcome in a run folder, whole or not at all."""
    partial = folder / f"{OUTCOME}.partial"
    partial.write_text(json.dumps(asdict(outcome)) + "\n", encoding="utf-8")
    os.replace(partial, folder / OUTCOME)


def read_outcome(folder: Path) -> Outcome | None:
    """What the arm of a run folder left, or None."""
    path = folder / OUTCOME
    return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def run_arm(folder: Path, console: Console, progress: ShowProgress) -> Outcome:
    """Train as the folder's `arm.json` says, going on where an earlier attempt stopped, then score.

    Whatever goes wrong becomes the outcome: nothing is raised.
    """
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    config = resolve(spec["config"], str(folder / SPEC))
    try:
        outcome = _train_and_score(config, spec["score"], console, progress)
    except KeyboardInterrupt:
        outcome = Outcome("interrupted", "interrupted")
    except Exception as error:
        outcome = outcome_of(error)
        if not isinstance(error, FourBitError) and outcome.status == "failed":
            traceback.print_exc()
    write_outcome(folder, outcome)
    return outcome


def outcome_of(error: BaseException) -> Outcome:
    """What an exception means: no memory, where it or one that it came from says so, else a failure."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        if isinstance(seen, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
            return Outcome("no memory", _first_line(seen))
        seen = seen.__cause__ or seen.__context__
    return Outcome("failed", _first_line(error))


def end_with_parent() -> None:
    """End this process at once when the one that holds the other end of standard input ends."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # a buffered read would hold a lock that exiting needs
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _train_and_score(
    config: RunConfig, score: Sequence[str], console: Console, progress: ShowProgress
) -> Outcome:
    from transformers.utils import logging as hf_logging

    from fourbit.memory.measure import release_free_memory
    from fourbit.training import checkpoint
    from fourbit.training import run as training

    hf_logging.disable_progress_bar()  # of writing weights, between the lines of the training
    folder = Path(config.output)
    summary = _summary(folder)
    if summary.get("stopped") not in ("done", "early"):
        resume = checkpoint.exists(folder)
        if training.run(config, console, resume=resume, overwrite=not resume).stopped == "interrupted":
            return Outcome("interrupted", "interrupted")
        summary = _summary(folder)
        gc.collect()
        release_free_memory()
    if not math.isfinite(summary["heldout_loss"]):
        return Outcome("failed", "the held-out loss is not finite; lower train.learning_rate")
    right, score_seconds = _score(config, score, console, progress) if score else (None, 0.0)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # for resuming only, and large
    return Outcome(
        "finished",
        heldout_loss=summary["heldout_loss"],
        best_step=summary["best_step"],
        steps=summary["steps"],
        tokens=summary["tokens"],
        right=right,
        peak_bytes=summary["peak_bytes"],
        seconds=_seconds(folder),
        score_seconds=score_seconds,
        trainable_parameters=summary["trainable_parameters"],
        parameters=summary["parameters"],
    )


def _score(
    config: RunConfig, files: Sequence[str], console: Console, progress: ShowProgress
) -> tuple[list[bool], float]:
    """Which answers are right, of the model as the run left it on disk, loaded anew; and seconds."""
    from fourbit.data.read import read_rows
    from fourbit.evaluate.task import evaluate
    from fourbit.model.adapters import load_adapter
    from fourbit.model.load import load

    adapter, settings = Path(config.output) / "adapter", config.model
    model: Any
    if config.lora is None:  # the whole model, in 16 bits where the hardware has them
        model, tokenizer = load(
            adapter, quant_type="none", compute_dtype=settings.compute_dtype, device=settings.device
        )
    else:
        base, tokenizer = load(settings.path, **settings.model_dump(exclude={"path"}))
        model = load_adapter(base, adapter)
    rows = read_rows(files, config.data)
    with progress("score", console) as report:
        result = evaluate(
            model,
            tokenizer,
            rows,
            config.data,
            config.eval,
            loss=False,
            samples=0,
            progress=report,
        )
    assert result.right is not None, "rows without answers are not scored"
    return result.right, result.seconds


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _seconds(folder: Path) -> float:
    from fourbit.report.curves import read_curves

    return read_curves(folder).seconds


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, FourBitError) else f"{type(error).__name__}: {text[:200]}"
