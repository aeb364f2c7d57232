"""Steps of AdamW on pieces of many sizes in one launch: the reference's bytes."""

from __future__ import annotations

import math

import pytest
import torch

from fourbit import reference
from fourbit.kernels.gpu import optimizer

SIZES = (1, 255, 256, 257, 1024, 3000)


def coefficients(step: int) -> torch.Tensor:
    values = (0.99, 0.9, 0.1, 0.999, 0.001, 1 / math.sqrt(1 - 0.999**step), 1e-8, 1e-3 / (1 - 0.9**step))
    return torch.tensor(values, dtype=torch.float64).float()


def piece(size: int, bits: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(size)
    weight, grad = torch.randn(2, size, generator=generator)
    grad *= 10.0 ** -torch.randint(0, 8, (size,), generator=generator)
    if size > 300:
        grad[:260] = 0.0
    states = [torch.zeros(size) for _ in range(2)]
    if bits == 8:
        codes = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
        scales = [torch.zeros(-(-size // 256)) for _ in range(2)]
        states = [codes[0], scales[0], codes[1], scales[1]]
    return tuple(part.clone().to(device) for part in (weight, grad, *states))


@pytest.mark.parametrize("bits", [32, 8])
def test_bytes_of_the_reference(bits: int, device: torch.device) -> None:
    ours, wanted = ([piece(size, bits, device) for size in SIZES] for _ in range(2))
    name = "adamw" if bits == 32 else "adamw_8bit"
    for step in range(1, 4):
        # Pieces have seen different numbers of steps.
        numbers = [coefficients(step + place) for place in range(len(SIZES))]
        getattr(optimizer, name)([(*p, n) for p, n in zip(ours, numbers, strict=True)])
        for parts, number in zip(wanted, numbers, strict=True):
            getattr(reference, name)(*parts, number)
    for found, right in zip(ours, wanted, strict=True):
        assert all(map(torch.equal, found, right))
