"""The fastest choice that fits a budget, and what was passed over on the way to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fourbit.errors import MemoryBudgetError
from fourbit.memory.plan import Choice, Plan, Refused
from fourbit.memory.sizes import size_text

#: Passes of a layer: forward, about two backward, and one more where backward recomputes it.
_KEEPING, _RECOMPUTING = 3, 4
#: Tokens at which a micro-batch's fixed cost (restoring weights, starting kernels) equals its products'.
_FIXED_TOKENS = 64
#: The same of a piece of the loss, each of which reads the whole head again (docs/log.md).
_FIXED_LABELS = 20
#: What reading and writing optimizer states costs a step.
_PAGING = 1.02
#: What writing and reading the inputs of layers costs, beside the computing.
_WAITING = 1.05
#: What reading weights from the disk for every micro-batch costs.
_READING = 1.5


@dataclass(frozen=True)
class Head:
    """The head of a model, of which the loss forms logits in pieces.

    share     of the weights that a token is multiplied with
    words     rows of the head
    labelled  share of the tokens that carry a label
    """

    share: float
    words: int
    labelled: float = 1.0

    def labels(self, chunk: int) -> float:
        """Labels of a piece of so many MiB of logits in fp32."""
        return max(1.0, chunk * 2**20 / (4 * self.words))


NO_HEAD = Head(0.0, 1)


def alternatives(
    effective_batch: int,
    loss_chunk: int,
    tokens: int,
    optimizer_memory: int | None = None,
    tiers: Sequence[str] = ("device",),
    activation_tiers: Sequence[str] = ("device",),
    head: Head = NO_HEAD,
) -> list[Choice]:
    """All choices, those expected to be faster first.

    head              of the model; none: choices differ in nothing that it costs
    tiers             where the packed weights may be; those on the disk need activation checkpointing
    activation_tiers  where the inputs of layers may wait, with activation checkpointing
    """
    sizes = [1 << power for power in range(effective_batch.bit_length())]
    rows = sorted({*(size for size in sizes if size <= effective_batch), effective_batch})
    chunks = sorted({loss_chunk, max(1, loss_chunk // 4)}, reverse=True)
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
        computed = choice.micro_batch * tokens
        passes = _RECOMPUTING if choice.activation_checkpointing else _KEEPING
        time = (1 - head.share) * passes * (1 + _FIXED_TOKENS / computed)
        labels = min(head.labels(choice.loss_chunk), max(1.0, computed * head.labelled))
        time += head.share * head.labelled * _KEEPING * (1 + _FIXED_LABELS / labels)
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
