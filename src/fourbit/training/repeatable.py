"""The same settings give the same bytes: torch's own randomness keyed, its kernels fixed.

Order and the adapters' dropout are keyed by themselves (data.order, nn.dropout). What is left draws from
torch's generator: dropout in PEFT's own forward pass, and whatever a model's code brings along.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(device: torch.device, deterministic: bool) -> Iterator[None]:
    """Within this block torch takes kernels without races, if `deterministic`; its generators are restored.

    A kernel that has no such form is used all the same and torch warns of it.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's condition for it
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Filling every new tensor with NaN is for finding defects, and slow.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if deterministic:
                torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
                torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def seed_micro_batch(seed: int, step: int, index: int) -> None:
    """Start torch's generators anew for one micro-batch, so that no resumed run needs their state."""
    digest = hashlib.sha256(f"{seed} {step} {index}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
