"""The mask and the product are the reference's bytes, whatever the keys."""

from __future__ import annotations

import pytest
import torch

from fourbit import reference
from fourbit.kernels.gpu import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 8), (3, 100), (2, 2500)])
def test_bytes_of_the_reference(dtype: torch.dtype, tokens: int, columns: int, device: torch.device) -> None:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    rows = torch.tensor([0, 7, 2**40 + 5][:tokens], device=device)
    positions = torch.tensor([0, 1, 8191][:tokens], device=device)
    for layer, seed, step, p in ((0, 0, 0, 0.3), (1, 1, 1, 0.0), (2**32 - 5, 2**63 + 12345, 2**31 + 3, 0.95)):
        found = dropout.dropout(x, rows, positions, layer, seed, step, p)
        assert torch.equal(found, reference.keyed_dropout(x, p, rows, positions, layer, seed, step))


def test_nothing(device: torch.device) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert dropout.dropout(torch.empty(0, 8, device=device), none, none, 0, 0, 0, 0.1).shape == (0, 8)
