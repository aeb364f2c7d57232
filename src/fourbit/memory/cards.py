"""Graphics cards by name and what of their memory a program gets."""

from __future__ import annotations

from dataclasses import dataclass

from fourbit.errors import ConfigError, nearest

_GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A card: bytes of its memory, and whether it computes in bf16 (compute capability 8.0)."""

    name: str
    memory: int
    bf16: bool = True


_CARDS = {
    name: Card(label, gib * _GIB, bf16)
    for name, label, gib, bf16 in (
        ("t4", "Tesla T4", 16, False),
        ("v100-16gb", "Tesla V100 16 GB", 16, False),
        ("v100-32gb", "Tesla V100 32 GB", 32, False),
        ("rtx-2080-ti", "GeForce RTX 2080 Ti", 11, False),
        ("rtx-3060", "GeForce RTX 3060", 12, True),
        ("rtx-3090", "GeForce RTX 3090", 24, True),
        ("rtx-4060", "GeForce RTX 4060", 8, True),
        ("rtx-4060-ti-16gb", "GeForce RTX 4060 Ti 16 GB", 16, True),
        ("rtx-4080", "GeForce RTX 4080", 16, True),
        ("rtx-4090", "GeForce RTX 4090", 24, True),
        ("rtx-5090", "GeForce RTX 5090", 32, True),
        ("a10", "A10", 24, True),
        ("l4", "L4", 24, True),
        ("l40s", "L40S", 48, True),
        ("a6000", "RTX A6000", 48, True),
        ("a100-40gb", "A100 40 GB", 40, True),
        ("a100-80gb", "A100 80 GB", 80, True),
        ("h100", "H100 80 GB", 80, True),
        ("h200", "H200", 141, True),
    )
}


def find_card(name: str) -> Card:
    """A card by its short name, such as rtx-4090. Raises ConfigError that lists the known ones."""
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key not in _CARDS:
        known = ", ".join(_CARDS)
        raise ConfigError(f"device '{name}': unknown card{nearest(key, _CARDS)}; known are cpu, {known}")
    return _CARDS[key]
