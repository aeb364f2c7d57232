"""What a plan is for: the rows of a run, and the device that it will run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fourbit.config import RunConfig
from fourbit.data.examples import lengths_of, trained_of
from fourbit.data.render import Example
from fourbit.memory.cards import find_card
from fourbit.model.compute import choose_compute_dtype, choose_device
from fourbit.shapes import rounded_size


@dataclass(frozen=True)
class Rows:
    """What memory depends on in the rows of a run.

    longest  tokens of the longest row
    trained  the largest share of a row's tokens that carries a label
    count    training rows
    shapes   padded lengths that occur
    words    of the tokenizer; None: as many as the model has
    heldout  held-out rows, and tokens of the longest of them; None: as many and as long as may be
    """

    longest: int
    trained: float = 1.0
    count: int | None = None
    shapes: int = 1
    words: int | None = None
    heldout: tuple[int, int] | None = None

    @staticmethod
    def of(train: Sequence[Example], heldout: Sequence[Example], words: int) -> Rows:
        """The figures of encoded rows, and of the tokenizer."""
        lengths = lengths_of(train)
        others = lengths_of(heldout)
        return Rows(
            longest=max(lengths),
            trained=max(n / length for n, length in zip(trained_of(train), lengths, strict=True)),
            count=len(train),
            shapes=len({rounded_size(length) for length in lengths}),
            words=words,
            heldout=(len(others), max(others, default=0)),
        )


@dataclass(frozen=True)
class Target:
    """Where a run will be: on this machine's processor or card, or on a named card that need not be here."""

    name: str
    on_cpu: bool
    dtype: torch.dtype
    memory: int | None

    @staticmethod
    def of(config: RunConfig, device: str | None) -> Target:
        """`device` is cpu, cuda, or a card's name; None: where the settings say. Raises ConfigError."""
        wanted = config.model.compute_dtype
        if device is not None and device.split(":")[0] not in ("auto", "cpu", "cuda"):
            card = find_card(device)
            dtype = getattr(torch, wanted if wanted != "auto" else "bfloat16" if card.bf16 else "float16")
            return Target(card.name, False, dtype, card.memory)
        found = choose_device(device or config.model.device)
        dtype = choose_compute_dtype(wanted, found).dtype
        if found.type == "cpu":
            return Target("CPU", True, dtype, None)
        properties = torch.cuda.get_device_properties(found)
        return Target(properties.name, False, dtype, properties.total_memory)
