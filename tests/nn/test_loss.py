from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fourbit.data.batch import Batch
from fourbit.nn import loss
from fourbit.nn.loss import Head, causal_lm_loss, head_loss, linear_cross_entropy
from tests.tiny import llama


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    logits = scale * (hidden @ weight.T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
@pytest.mark.parametrize("tokens", [1, 7, 53])
def test_loss_and_gradients_against_fp64(
    monkeypatch: pytest.MonkeyPatch, tokens: int, scale: float, softcap: float | None
) -> None:
    monkeypatch.setattr(loss, "_chunk_rows", lambda vocabulary, chunk: 10)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 33, requires_grad=True)
    weight = torch.randn(101, 33, requires_grad=True)
    labels = torch.randint(0, 101, (tokens,))
    total, count = linear_cross_entropy(hidden, weight, labels, scale, softcap)
    (3 * total).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = reference(*exact, labels, scale, softcap)
    (3 * truth).backward()
    assert count == tokens
    assert total.item() == pytest.approx(truth.item(), rel=1e-5)
    for ours, true in ((hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert (ours.double() - true).norm() / true.norm() < 1e-5


def test_bf16_is_no_worse_than_torch_s_own() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 128), torch.randn(500, 128) / 11
    labels = torch.randint(0, 500, (64,))
    exact = hidden.bfloat16().double().requires_grad_()
    truth = reference(exact, weight.bfloat16().double(), labels, 1.0, None)
    truth.backward()
    errors = []
    for own in (True, False):
        x = hidden.bfloat16().requires_grad_()
        if own:
            total, _ = linear_cross_entropy(x, weight.bfloat16(), labels)
        else:
            total = F.cross_entropy(x @ weight.bfloat16().T, labels, reduction="sum")
        total.backward()
        errors.append((x.grad.double() - exact.grad).norm() / exact.grad.norm())
        if own:
            assert total.item() == pytest.approx(truth.item(), rel=1e-3)
    assert errors[0] <= errors[1] + 1e-4


def test_under_autocast_products_are_of_its_dtype() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 33, requires_grad=True), torch.randn(50, 33, requires_grad=True)
    labels = torch.randint(0, 50, (9,))
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, labels)
    wanted, _ = linear_cross_entropy(*low, labels)
    total.backward()
    wanted.backward()
    assert total.item() == wanted.item()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(hidden.grad, low[0].grad.float())
    torch.testing.assert_close(weight.grad, low[1].grad.float(), rtol=1e-2, atol=1e-3)


def test_ignored_labels_cost_nothing_and_count_nothing() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    labels = torch.tensor([3, -100, 4, -100, -100])
    total, count = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert count == 2
    assert total.item() == pytest.approx(
        F.cross_entropy(hidden @ weight.T, labels, reduction="sum").item(), rel=1e-5
    )
    assert hidden.grad[[1, 3, 4]].abs().max() == 0


def test_no_label_at_all_gives_zero_and_still_differentiates() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    total, count = head_loss(
        hidden, Head(torch.nn.Linear(8, 11, bias=False)), torch.empty(0, dtype=torch.int64)
    )
    total.backward()
    assert (total.item(), count) == (0.0, 0)


def test_a_wrapped_head_goes_through_the_module() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11, bias=True)
    hidden, labels = torch.randn(6, 8, requires_grad=True), torch.randint(0, 11, (6,))
    total, count = head_loss(hidden, Head(head, scale=0.5), labels)
    total.backward()
    expected = F.cross_entropy(0.5 * head(hidden.detach()), labels, reduction="sum")
    assert (total.item(), count) == (pytest.approx(expected.item(), rel=1e-6), 6)
    assert head.bias.grad is not None


def test_the_models_own_loss_is_the_mean_of_ours() -> None:
    model = llama().eval()
    torch.manual_seed(0)
    ids = torch.randint(3, 200, (3, 17))
    labels = ids.clone()
    labels[0, :9] = -100
    mask = torch.ones_like(ids)
    mask[2, 12:] = 0
    labels[2, 12:] = -100
    positions = torch.arange(17).expand(3, 17)
    total, count = causal_lm_loss(model, Batch(ids, mask, labels, positions, torch.arange(3)))
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert count == int((labels[:, 1:] != -100).sum())
    assert total.item() / count == pytest.approx(theirs.item(), rel=1e-5)
