"""`fourbit plan`: what memory a run will take, and the fastest way to stay within a budget."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fourbit.cli.common import add_config_arguments, console, print_json, read_settings
from fourbit.errors import ConfigError, MemoryBudgetError
from fourbit.memory.sizes import parse_size

if TYPE_CHECKING:
    from rich.console import Console

    from fourbit.config import RunConfig
    from fourbit.memory.plan import Plan


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "plan",
        help="say what memory a run will take",
        description="Say what memory a run will take, part by part, from configuration and headers alone: no "
        "weights are read, rows are taken to be data.max_length tokens long.",
        epilog="example: fourbit plan --model models/llama-7b --device rtx-4090 --memory 20GB "
        "--set lora.r=64",
    )
    add_config_arguments(parser)
    add_memory_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, or a card such as rtx-4090, which need not be here")
    parser.add_argument(
        "--time",
        action="store_true",
        help="also time a few layers of this shape, with random weights, on this machine's CPU",
    )
    parser.set_defaults(run=run)


def add_memory_argument(parser: argparse.ArgumentParser) -> None:
    """--memory."""
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="a budget such as 24GB or 900MB (powers of ten): choose batches, checkpointing, and where "
        "states and weights lie, so that the run stays below it and is as fast as can be",
    )


def _timed(config: RunConfig, plan: Plan, out: Console) -> Plan:
    """The plan with the time of a step."""
    from fourbit.training.budget import with_choice
    from fourbit.training.pace import step_seconds

    if plan.device != "CPU":
        raise ConfigError(
            f"--time times this machine's CPU, and this plan is for {plan.device}; leave it out"
        )
    with out.status("timing a few layers"):
        return replace(plan, step_seconds=step_seconds(with_choice(config, plan.choice)))


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 if it fits what it was asked to."""
    budget = parse_size(args.memory) if args.memory else None
    if args.config is None and args.data is None:
        args.data = "data.jsonl"  # not read
    config = read_settings(args)
    from fourbit.memory.show import print_plan
    from fourbit.training.planner import plan_run

    out = console(args.json)
    with out.status("planning"):
        plan = plan_run(config, budget, args.device)
    if args.time:
        plan = _timed(config, plan, out)
    if args.json:
        print_json(plan.to_dict())
    else:
        print_plan(plan, out)
    return 0 if plan.fits else MemoryBudgetError.exit_code
