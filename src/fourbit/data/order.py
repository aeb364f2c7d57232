"""Permutations that depend on their keys alone: the same on every machine and under every numpy.

numpy keeps the raw stream of PCG64 and of SeedSequence fixed for all time, but not the methods of its
Generator, so a permutation here is the stable order of raw 64-bit draws.
"""

from __future__ import annotations

import numpy as np

# Streams of one seed must not repeat each other, so each use has its own key.
SPLIT, EPOCH, BATCHES, SAMPLE = range(4)


def permutation(count: int, seed: int, *key: int) -> list[int]:
    """0 to count - 1 in an order given by seed and key (integers, not negative)."""
    draws = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    order: list[int] = np.argsort(draws, kind="stable").tolist()
    return order
