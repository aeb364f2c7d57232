"""A plan: what will use memory while a run loads, trains, evaluates and saves, part by part.

peak = what is held throughout + the largest of what the phases need on top of it
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    size    bytes
    detail  what it is made of, in a few words
    tier    where it lives: device, host or disk
    """

    name: str
    size: int
    detail: str = ""
    tier: str = "device"


@dataclass(frozen=True)
class Phase:
    """A moment of a run and what it needs beside what is held; its parts stand at the same time.

    absent  bytes of held parts that are not there yet, or no longer
    """

    name: str
    parts: tuple[Part, ...]
    absent: int = 0

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts) - self.absent


@dataclass(frozen=True)
class Choice:
    """What of a run may be changed to make it fit: none of it changes a result beyond rounding.

    micro_batch               rows computed at once
    activation_checkpointing  whether layers are recomputed in backward
    loss_chunk                MiB of logits formed at once
    optimizer_memory          MiB of optimizer states that stay beside the weights; None: all
    weight_tier               of the packed weights: device, host or disk
    activation_tier           of what checkpointing keeps: device, host, or disk
    """

    micro_batch: int
    activation_checkpointing: bool
    loss_chunk: int
    optimizer_memory: int | None = None
    weight_tier: str = "device"
    activation_tier: str = "device"

    def text(self) -> str:
        recomputed = "with" if self.activation_checkpointing else "no"
        paged = ", paged optimizer" if self.optimizer_memory is not None else ""
        places = {"device": "", "host": ", weights in host memory", "disk": ", weights on disk"}
        weights = places[self.weight_tier]
        inputs = f", activations on {self.activation_tier}" if self.activation_tier != "device" else ""
        micro_batch = f"micro_batch {self.micro_batch}, {recomputed} checkpointing"
        return f"{micro_batch}, loss_chunk {self.loss_chunk}{paged}{weights}{inputs}"


@dataclass(frozen=True)
class Refused:
    """An alternative that was not taken, with its peak in bytes and why."""

    choice: Choice
    peak: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a run will use.

    model, device    for people
    parameters       weights of the base, exactly
    trainable        trained weights, exactly
    tokens           length that the longest rows are padded to
    effective_batch  rows of an optimizer step, which no choice changes
    choice           what the run does
    held             parts that stay throughout training
    phases           what each moment of a run needs beside them
    budget           bytes that were asked to suffice, or None
    refused          alternatives that were passed over under a budget
    step_seconds     of an optimizer step on this machine, where it was timed
    uncertain        bytes that runs have been seen to take beyond their peak; a budget must hold them too
    """

    model: str
    device: str
    parameters: int
    trainable: int
    tokens: int
    effective_batch: int
    choice: Choice
    held: tuple[Part, ...]
    phases: tuple[Phase, ...]
    budget: int | None = None
    refused: tuple[Refused, ...] = ()
    step_seconds: float | None = None
    uncertain: int = 0

    @property
    def highest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.size)

    @property
    def peak(self) -> int:
        """Bytes at the highest moment."""
        return sum(part.size for part in self.held) + self.highest.size

    @property
    def measurable_peak(self) -> int:
        """The peak as a run measures its own: on a card, what torch allocates, without the runtime."""
        runtime = sum(part.size for part in self.held if part.name == "runtime")
        return self.peak if self.device == "CPU" else self.peak - runtime

    @property
    def most(self) -> int:
        """Bytes that suffice in all likelihood."""
        return self.peak + self.uncertain

    @property
    def fits(self) -> bool:
        return self.budget is None or self.most <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the derived ones included."""
        return {
            **asdict(self),
            "phases": [{**asdict(phase), "size": phase.size} for phase in self.phases],
            "highest": self.highest.name,
            "peak": self.peak,
            "fits": self.fits,
        }
