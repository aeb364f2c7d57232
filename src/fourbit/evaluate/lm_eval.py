"""lm-eval-harness (EleutherAI) on a model as fourbit holds it: 4-bit weights, with or without adapter.

Tasks are the harness's own YAML files, on this machine; so are the data files that they name. What the
harness reports is returned as it is: its figures can be put beside anyone's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.config import EvalSettings
from fourbit.errors import ConfigError
from fourbit.evaluate.context import evaluating

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task; stderr: its standard error, or None where the harness gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    rows: int


def check_tasks(files: Sequence[str | Path]) -> None:
    """Raise ConfigError, before a model is loaded, if the harness or a task file is missing."""
    for file in files:
        if not Path(file).is_file() or Path(file).suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{file}: no such task file; give an lm-eval task as a local .yaml file")
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-eval-harness is not installed; `pip install 'fourbit[lm-eval]'` adds it")


def score_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[str | Path],
    settings: EvalSettings,
    *,
    limit: int | None = None,
) -> list[TaskScore]:
    """Run the tasks of YAML files, of each only the first `limit` rows. The harness shows its progress.

    Raises ConfigError if lm-eval is not installed, or if a task or its data cannot be read.
    """
    check_tasks(files)
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=False)
        tasks = [task for file in files for task in _tasks(manager, file)]
        harness: Any = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=settings.batch_size
        )
        with evaluating(model):
            report: dict[str, Any] = simple_evaluate(
                model=harness,
                tasks=tasks,
                task_manager=manager,
                limit=limit,
                log_samples=False,
                apply_chat_template=settings.choice_prompt == "chat",
            )
    return list(_scores(report))


def _tasks(manager: Any, file: str | Path) -> list[Any]:
    try:
        return list(manager.load([str(file)])["tasks"].values())
    except Exception as error:  # the harness and `datasets` raise anything for a wrong file
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ConfigError(f"{file}: lm-eval cannot load this task: {reason}") from None


def _scores(report: dict[str, Any]) -> Iterator[TaskScore]:
    for task, figures in report["results"].items():
        rows = int(report.get("n-samples", {}).get(task, {}).get("effective", 0))
        for name, value in figures.items():
            metric, comma, method = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{method}")
            shown = metric if method == "none" else f"{metric} ({method})"
            yield TaskScore(
                task, shown, float(value), float(error) if isinstance(error, int | float) else None, rows
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks on how it was called, which are meant for its own command line."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
