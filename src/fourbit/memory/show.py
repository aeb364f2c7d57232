"""A plan as a person reads it, at 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fourbit.memory.plan import Part, Plan
from fourbit.memory.sizes import size_text

#: Refused alternatives that are printed.
_SHOWN = 6


def print_plan(plan: Plan, out: Console) -> None:
    """The table, the choice, and what was refused."""

    def line(text: str) -> None:
        out.print(text, highlight=False, soft_wrap=True, markup=False)

    line(f"{plan.model} on {plan.device}")
    line(f"parameters: {plan.parameters:,}, trained: {plan.trainable:,}")
    steps = -(-plan.effective_batch // plan.choice.micro_batch)
    line(f"{plan.choice.text()}")
    line(f"rows of up to {plan.tokens:,} tokens, {plan.effective_batch} a step in {steps} micro-batches\n")
    table = Table(box=None, pad_edge=False, show_header=False)
    # The least widths keep names and sizes whole where a long detail would have their room.
    table.add_column(no_wrap=True, min_width=20)
    table.add_column(justify="right", no_wrap=True, min_width=8)
    table.add_column(style="dim", overflow="ellipsis", no_wrap=True)
    for part in plan.held:
        table.add_row(*_row(part))
    highest = plan.highest
    for part in highest.parts:
        if part.size:
            table.add_row(*_row(part))
    table.add_row("peak", size_text(plan.peak), f"during {highest.name}", style="bold")
    out.print(table, highlight=False)
    held = sum(part.size for part in plan.held)
    others = ", ".join(f"{p.name} {size_text(held + p.size)}" for p in plan.phases if p is not highest)
    line(f"\npeak of other phases: {others}")
    if plan.step_seconds is not None:
        minutes = 1000 / 60 * plan.step_seconds / plan.effective_batch
        line(f"a step takes about {plan.step_seconds:.3g} s here, 1,000 such rows {minutes:,.1f} minutes")
    if plan.uncertain:
        line(
            f"runs have taken up to {size_text(plan.uncertain)} more than so predicted; budgets must hold it"
        )
    if plan.budget is not None:
        verdict = "fits" if plan.fits else "does not fit"
        line(f"{verdict} in {size_text(plan.budget)}")
    for refused in plan.refused[:_SHOWN]:
        line(f"refused: {refused.choice.text()}: {refused.reason}")
    if len(plan.refused) > _SHOWN:
        line(f"and {len(plan.refused) - _SHOWN} more (--json lists them)")


def _row(part: Part) -> tuple[str, str, str]:
    return part.name, size_text(part.size), part.detail
