from __future__ import annotations

import torch

from fourbit.shapes import rounded_size, with_rounded_rows


def test_four_sizes_per_power_of_two_and_none_too_small() -> None:
    sizes = [rounded_size(n) for n in range(1, 4097)]
    assert all(size >= n and size <= 1.25 * n for n, size in enumerate(sizes, start=1))
    assert sorted({size for size in sizes if 128 < size <= 1024}) == [
        160,
        192,
        224,
        256,
        320,
        384,
        448,
        512,
        640,
        768,
        896,
        1024,
    ]
    assert all(rounded_size(size) == size for size in sizes)


def test_rows_are_added_where_bf16_code_is_generated() -> None:
    x = torch.ones(33, 3, dtype=torch.bfloat16)
    padded = with_rounded_rows(x)
    assert padded.shape == (40, 3)
    assert torch.equal(padded[:33], x)
    assert padded[33:].abs().max() == 0
    assert with_rounded_rows(x.float()).shape == (33, 3)
