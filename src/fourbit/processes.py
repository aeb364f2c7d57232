"""The processes of one run, started by torchrun: who this one is, what it computes, what all agree on.

Every process has the same rows, the same order and the same adapter. Of each optimizer step it computes some
of the micro-batches; gradients and losses are then summed over all of them, so that every process goes on
with the same numbers. Losses are added in the order in which one process would have added them.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from fourbit.errors import ConfigError

Item = TypeVar("Item")
#: Values of gradients that are summed in one message.
_MESSAGE = 8 << 20
_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    rank, size  which one this is, and how many there are
    together    all of them must compute as often, since they gather weights from each other
    """

    rank: int = 0
    size: int = 1
    together: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is the one that prints, and writes the run folder."""
        return self.rank == 0

    def turns(self, items: Sequence[Item]) -> Iterator[tuple[int, Item, bool]]:
        """(place, item, whether it counts) of the items that this process computes.

        One that does not count is computed for the others' sake, where all must compute as often.
        """
        rounds = -(-len(items) // self.size)
        for place in range(self.rank, rounds * self.size, self.size):
            if place < len(items):
                yield place, items[place], True
            elif self.together:
                yield place, items[-1], False

    def merged(self, values: Sequence[float]) -> list[float]:
        """Numbers of which each process knows some, and has zero for the others."""
        if self.size == 1:
            return list(values)
        table = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(table)  # exact: beside the number there are zeros alone
        return [float(value) for value in table]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; all must ask."""
        return any(self.merged([float(flag and rank == self.rank) for rank in range(self.size)]))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all processes; a weight that has one in none keeps none."""
        if self.size == 1:
            return
        known = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MAX)
        gradients = []
        for parameter, has in zip(parameters, known.tolist(), strict=True):
            if has:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for message in _messages(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in message])
            torch.distributed.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in message])
            for gradient, part in zip(message, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


ALONE = Processes()


@cache
def join() -> Processes:
    """The processes that torchrun has started, met; one alone where it has not.

    Raises ConfigError where they cannot meet.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        if not torch.distributed.is_initialized():
            # What a card sums goes over NCCL, the few numbers beside it over Gloo.
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            )
            atexit.register(_leave)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{size} processes cannot meet ({reason}); start them with torchrun") from None
    return Processes(rank, size)


def alone() -> dict[str, str]:
    """The environment for a process that runs by itself: torchrun's variables would make it wait."""
    return {key: value for key, value in os.environ.items() if key not in _TORCHRUN}


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, up to so many values together."""
    message: list[Tensor] = []
    for tensor in tensors:
        full = sum(part.numel() for part in message) + tensor.numel() > _MESSAGE
        if message and (full or message[0].dtype != tensor.dtype):
            yield message
            message = []
        message.append(tensor)
    if message:
        yield message
