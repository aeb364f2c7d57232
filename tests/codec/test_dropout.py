"""Keyed dropout: the generator's published vectors, equal masks everywhere, and its statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourbit import functional as F4
from fourbit import reference
from fourbit.errors import QuantizationError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def keys(tokens: int) -> dict[str, Tensor]:
    return {"rows": torch.randint(2**40, (tokens,)), "positions": torch.randint(8192, (tokens,))}


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    result = reference.philox(words, torch.tensor([int(word, 16) for word in key.split()]))
    assert " ".join(f"{word.item():08x}" for word in result) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 8, 64, 577])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
def test_same_bytes_as_the_reference(implementation: str, dtype: torch.dtype, columns: int, p: float) -> None:
    x, where = torch.randn(13, columns).to(dtype), keys(13)
    for layer, seed, step in ((0, 0, 0), (2**32 - 1, 2**63 - 1, 2**31), (17, -(2**63), 5)):
        how = {"layer": layer, "seed": seed, "step": step}
        expected = reference.keyed_dropout(x, p, *where.values(), **how)
        got = F4.keyed_dropout(x, p, **where, **how)
        assert got.dtype == dtype
        assert torch.equal(got, expected)
    if p == 0:
        assert torch.equal(got, x)


def test_gradient_takes_the_same_mask(implementation: str) -> None:
    x, where = torch.randn(9, 33, requires_grad=True), keys(9)
    grad = torch.randn(9, 33)
    F4.keyed_dropout(x, 0.3, **where, layer=1, seed=2, step=3).backward(grad)
    assert torch.equal(x.grad, F4.keyed_dropout(grad, 0.3, **where, layer=1, seed=2, step=3))


def test_a_mask_belongs_to_its_token_alone(implementation: str) -> None:
    x, where = torch.ones(40, 100), keys(40)
    how = {"layer": 4, "seed": 5, "step": 6}
    full = F4.keyed_dropout(x, 0.2, **where, **how)
    order = torch.randperm(40)
    shuffled = F4.keyed_dropout(x, 0.2, where["rows"][order], where["positions"][order], **how)
    assert torch.equal(shuffled, full[order])
    assert torch.equal(
        F4.keyed_dropout(x[:7], 0.2, where["rows"][:7], where["positions"][:7], **how), full[:7]
    )
    assert torch.equal(F4.keyed_dropout(x.T.contiguous().T, 0.2, **where, **how), full)


def test_every_key_changes_the_mask(implementation: str) -> None:
    one = torch.ones(1, 4096)
    base = {"rows": torch.tensor([1]), "positions": torch.tensor([2]), "layer": 3, "seed": 4, "step": 5}
    first = F4.keyed_dropout(one, 0.5, **base) == 0
    for name, value in base.items():
        other = F4.keyed_dropout(one, 0.5, **{**base, name: value + 1}) == 0
        # Independent fair coins agree on 2048 of 4096, give or take 32.
        assert abs((first == other).sum().item() - 2048) < 5 * 32, name


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_rate_and_scale(implementation: str, p: float) -> None:
    tokens = torch.arange(1000)
    y = F4.keyed_dropout(torch.ones(1000, 1000), p, tokens, tokens * 0, layer=0, seed=7, step=0)
    dropped = (y == 0).float()
    assert abs(dropped.mean().item() - p) < 5 * (p * (1 - p) / 1e6) ** 0.5
    for share in (dropped.mean(0), dropped.mean(1)):  # no column and no token is favoured
        assert (share - p).abs().max() < 6 * (p * (1 - p) / 1e3) ** 0.5
    steps = round(p * 65536)
    assert torch.equal(y[y != 0].unique(), torch.tensor([65536.0]) / (65536 - steps))


@pytest.mark.parametrize("p", [-0.1, 1.0, 0.999999, float("nan")])
def test_bad_rates_are_refused(p: float) -> None:
    with pytest.raises(QuantizationError, match="is outside 0 <= p < 1"):
        F4.keyed_dropout(torch.ones(1, 8), p, **keys(1), layer=0, seed=0, step=0)


def test_bad_keys_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"rows int64 \[T\]; x has shape \[2, 8\] and rows \[1\]"):
        F4.keyed_dropout(torch.ones(2, 8), 0.1, **keys(1), layer=0, seed=0, step=0)
    with pytest.raises(QuantizationError, match=r"positions int64 \[T\]; .* positions \[2\] of torch\.int32"):
        F4.keyed_dropout(
            torch.ones(2, 8), 0.1, torch.arange(2), torch.arange(2).int(), layer=0, seed=0, step=0
        )
