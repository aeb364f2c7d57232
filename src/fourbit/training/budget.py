"""A run and its plan: refused before it starts where it cannot fit, told apart from what it then took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from fourbit.config import RunConfig
from fourbit.data.render import Example
from fourbit.errors import MemoryBudgetError, ModelError
from fourbit.memory.limits import memory_limit
from fourbit.memory.plan import Choice, Plan
from fourbit.memory.sizes import size_text
from fourbit.training.planner import Planner
from fourbit.training.target import Rows, Target

#: Rows that every run has at least: what does not fit with these cannot fit with any.
_SHORTEST = Rows(longest=8)
#: A control group's limit is what was asked for, down to whole pages.
_ROUNDING = 1_000_000


class Budget:
    """What a run may take, asked before the model is loaded and again once the rows are known.

    memory  bytes that the user asked to suffice, or None
    """

    def __init__(self, config: RunConfig, memory: int | None) -> None:
        self._target = Target.of(config, None)
        self._memory = memory
        self._planner = Planner(config, self._target, _SHORTEST)
        self._limit = _limit(self._target)
        if memory is not None and self._limit is not None and memory > self._limit[0]:
            if memory > self._limit[0] + _ROUNDING:
                asked, there = size_text(memory), size_text(self._limit[0])
                raise MemoryBudgetError(f"memory {asked}: {self._limit[1]} is {there}; ask for less")
            self._memory = self._limit[0]

    def check_loading(self) -> None:
        """Raise MemoryBudgetError if even the shortest rows would not fit.

        A step on them takes less than what the run holds and loading needs, so twice that is room enough.
        """
        allowed = self._allowed
        if allowed is not None and allowed < 2 * self._planner.loaded_bytes:
            self._planner.choose(allowed)

    def loading(self, config: RunConfig) -> RunConfig:
        """The settings to load with: weights that may stay on the disk do, until the plan says where."""
        tiers = self._planner.tiers if self._memory is not None else (config.model.weight_tier,)
        return _with_weights(config, tiers[-1])

    def plan(
        self, train: Sequence[Example], heldout: Sequence[Example], words: int, end_to_end: bool
    ) -> Plan:
        """The plan of the run on these rows; under a budget the fastest that fits.

        words       of the tokenizer
        end_to_end  whether the rows of a micro-batch are laid so

        Raises MemoryBudgetError for one that would not fit.
        """
        self._planner.use_rows(Rows.of(train, heldout, words), end_to_end)
        if self._memory is not None:
            return self._planner.choose(self._memory)
        plan = self._planner.plan(self._planner.asked)
        if self._limit is not None and plan.peak > self._limit[0]:
            fitting = self._planner.choose(self._limit[0])
            raise MemoryBudgetError(
                f"this run would take {size_text(plan.peak)}, and {self._limit[1]} is "
                f"{size_text(self._limit[0])}; with {fitting.choice.text()} it takes "
                f"{size_text(fitting.most)} at most: --memory {self._limit[0] // 10**6}MB chooses that"
            )
        return plan

    @property
    def _allowed(self) -> int | None:
        return self._memory if self._memory is not None else self._limit[0] if self._limit else None


def open_budget(config: RunConfig, memory: int | None, console: Console) -> Budget | None:
    """The budget of a run about to be loaded, checked; None, with a line that says why, if it has no plan.

    Raises MemoryBudgetError for what cannot fit, ModelError for a budget on a model that cannot be planned.
    """
    try:
        with console.status("planning memory"):
            budget = Budget(config, memory)
            budget.check_loading()
            return budget
    except ModelError as error:
        if memory is not None:
            raise
        console.print(f"memory is not predicted: {error}", highlight=False, soft_wrap=True, markup=False)
        return None


def with_choice(config: RunConfig, choice: Choice) -> RunConfig:
    """The settings with what a plan chose."""
    changes = {
        "micro_batch": choice.micro_batch,
        "activation_checkpointing": choice.activation_checkpointing,
        "loss_chunk": choice.loss_chunk,
        "optimizer_memory": choice.optimizer_memory,
        "activation_tier": choice.activation_tier,
    }
    changed = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    return _with_weights(changed, choice.weight_tier)


def _with_weights(config: RunConfig, tier: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"weight_tier": tier})})


def prediction(plan: Plan | None) -> dict[str, Any]:
    """What summary.json keeps beside the measured `peak_bytes`: the predicted one, and the plan."""
    if plan is None:
        return {}
    return {"predicted_peak_bytes": plan.measurable_peak, "plan": plan.to_dict()}


def _limit(target: Target) -> tuple[int, str] | None:
    if target.on_cpu:
        return memory_limit()
    return (target.memory, f"the memory of {target.name}") if target.memory else None
