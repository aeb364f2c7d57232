"""The fastest choice that fits a budget, and what was passed over on the way to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fourbit.errors import MemoryBudgetError
from fourbit.memory.plan import Choice, Plan, Refused
from fourbit.memory.sizes import size_text

#: Recomputing a layer in backward adds a forward pass to one forward and about two backward.
_RECOMPUTING = 4 / 3
#: Tokens at which a micro-batch's fixed cost (restoring weights, starting kernels) equals its products'.
_FIXED_TOKENS = 64
#: What smaller pieces of the loss cost: each reads the whole head again.
_SMALL_CHUNK = 1.02
#: What reading and writing optimizer states costs a step.
_PAGING = 1.03
#: What writing and reading the inputs of layers costs, beside the computing.
_WAITING = 1.05
#: What reading weights from the disk for every micro-batch costs.
_READING = 1.5


def alternatives(
    effective_batch: int,
    loss_chunk: int,
    tokens: int,
    optimizer_memory: int | None = None,
    tiers: Sequence[str] = ("device",),
    activation_tiers: Sequence[str] = ("device",),
) -> list[Choice]:
    """All choices, those expected to be faster first.

    tiers             where the packed weights may be; those on the disk need activation checkpointing
    activation_tiers  where the inputs of layers may wait, with activation checkpointing
    """
    sizes = [1 << power for power in range(effective_batch.bit_length())]
    rows = sorted({*(size for size in sizes if size <= effective_batch), effective_batch})
    chunks = sorted({loss_chunk, max(1, loss_chunk // 4)})
    found = [
        Choice(n, recompute, chunk, paged, tier, waiting)
        for n in rows
        for recompute in (False, True)
        for chunk in chunks
        for paged in dict.fromkeys((optimizer_memory, 0))
        for tier in tiers
        for waiting in (activation_tiers if recompute else ("device",))
        if recompute or tier == "device"
    ]

    def cost(choice: Choice) -> float:
        time = 1 + _FIXED_TOKENS / (choice.micro_batch * tokens)
        time *= _RECOMPUTING if choice.activation_checkpointing else 1
        time *= _SMALL_CHUNK if choice.loss_chunk < loss_chunk else 1
        time *= _PAGING if choice.optimizer_memory == 0 else 1
        time *= _WAITING if choice.activation_tier != "device" else 1
        return time * (_READING if choice.weight_tier != "device" else 1)

    return sorted(found, key=cost)


def choose(plan_for: Callable[[Choice], Plan], choices: list[Choice], budget: int) -> Plan:
    """The first of the choices, given fastest first, whose plan fits the budget in bytes.

    Raises MemoryBudgetError that names the smallest budget that would do.
    """
    refused: list[Refused] = []
    least: Plan | None = None
    for choice in choices:
        plan = replace(plan_for(choice), budget=budget)
        if plan.fits:
            return replace(plan, refused=tuple(refused))
        refused.append(Refused(choice, plan.peak, f"{size_text(plan.most - budget)} too much"))
        if least is None or plan.most < least.most:
            least = plan
    assert least is not None
    raise MemoryBudgetError(does_not_fit(least))


def does_not_fit(plan: Plan) -> str:
    """One line about a plan that exceeds its budget."""
    held = sorted(plan.held, key=lambda part: -part.size)[:2]
    most = ", ".join(f"{part.name} {size_text(part.size)}" for part in held)
    return (
        f"{size_text(plan.budget or 0)} of memory do not suffice: the least that works here is "
        f"{size_text(plan.most)} ({plan.choice.text()}; {most}); give that much, shorten data.max_length, "
        "or lower lora.r"
    )
