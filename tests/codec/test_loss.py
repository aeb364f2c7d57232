"""The cross-entropy of a chunk of logits on a CPU: native and composed."""

from __future__ import annotations

import pytest
import torch

from fourbit.errors import QuantizationError
from fourbit.kernels import native
from fourbit.ops.loss import cross_entropy
from tests.losses import CASES, Case, check_against_fp64


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(implementation: str, case: Case) -> None:
    check_against_fp64(cross_entropy, case, torch.device("cpu"))


def test_numbers_that_are_not_finite_stay_so(implementation: str) -> None:
    logits = torch.tensor([[1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0], [1.0, float("-inf"), 2.0]])
    loss = cross_entropy(logits, torch.tensor([0, 0, 0]), 1.0, None, True)
    assert loss.isfinite().tolist() == [False, False, True]
    assert logits.isnan().any(dim=1).tolist() == [True, True, False]


def test_logits_far_apart(implementation: str) -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-1e30, 1e30, 0.0]])
    loss = cross_entropy(logits, torch.tensor([0, 0]), 1.0, None, True)
    assert loss.tolist() == pytest.approx([0.0, 2e30], rel=1e-6)
    torch.testing.assert_close(logits, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 5), torch.tensor([0, 5]), "labels go from 0 to 5; the head has 5 words"),
        (torch.zeros(2, 5), torch.tensor([-100, 4]), "labels go from -100 to 4"),
        (torch.zeros(5, 2).t(), torch.tensor([0, 1]), "contiguous"),
        (torch.zeros(2, 5), torch.tensor([0]), r"\[2, 5\] and \[1\]"),
        (torch.zeros(2, 5).double(), torch.tensor([0, 1]), "float64"),
    ],
)
def test_refused(implementation: str, logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        cross_entropy(logits, labels, 1.0, None, True)


@pytest.mark.skipif(not native.available(), reason="compares native code")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_same_bits_for_every_instruction_set_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None
) -> None:
    logits, labels = 5 * torch.randn(5, 20_011).bfloat16(), torch.tensor([0, 20_010, 7, 8191, 4096])
    before, found = native.isa(), []
    for isa, threads in ((isa, threads) for isa in native.isas() for threads in (1, 3)):
        native.set_isa(isa)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        given = logits.clone()
        found.append((cross_entropy(given, labels, 0.7, softcap, True), given))
    native.set_isa(before)
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))
