from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fourbit.data.render import Example
from fourbit.errors import DataError
from fourbit.evaluate.batching import length_batches
from fourbit.evaluate.heldout import HeldoutLoss, RowLoss, example_losses, heldout_loss, total_loss
from tests.evaluate.conftest import build


def examples(count: int) -> list[Example]:
    """Rows of 3 to 40 tokens of which some are trained, in unequal shares."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in range(count):
        length = int(torch.randint(3, 41, (1,), generator=generator))
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length, (1,), generator=generator))
        made.append(Example(ids, [index >= prompt for index in range(length)], row, f"f:{row}", prompt))
    return made


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 2048])
def test_every_token_counts_once(tokens_per_batch: int) -> None:
    model, rows = build("llama"), examples(13)
    total, count = 0.0, 0
    for row in rows:
        ids, trained = torch.tensor(row.input_ids), torch.tensor(row.trained)
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[None]).logits[0, :-1].double(), ids[1:], reduction="none")
        total, count = total + float(losses[trained[1:]].sum()), count + int(trained[1:].sum())
    found = heldout_loss(model, rows, 0, tokens_per_batch=tokens_per_batch)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 2048])
def test_losses_of_rows_add_up(tokens_per_batch: int) -> None:
    model, rows = build("llama"), examples(13)
    rows[4] = replace(rows[4], trained=[False] * len(rows[4].trained))
    seen: list[tuple[int, int]] = []
    found = example_losses(
        model, rows, 0, tokens_per_batch=tokens_per_batch, progress=lambda *at: seen.append(at)
    )
    assert found[4] == RowLoss(0.0, 0)
    for row, loss in zip(rows, found, strict=True):
        if loss.tokens:
            alone = heldout_loss(model, [row], 0)
            assert loss.tokens == alone.tokens
            assert loss.loss / loss.tokens == pytest.approx(alone.loss, rel=1e-5)
    whole = heldout_loss(model, rows, 0)
    assert total_loss(found).tokens == whole.tokens
    assert total_loss(found).loss == pytest.approx(whole.loss, rel=1e-6)
    assert seen[-1] == (13, 13)
    with pytest.raises(DataError, match="no token of the rows is trained"):
        total_loss([found[4]])


def test_the_model_trains_on_afterwards() -> None:
    model = build("llama").train()
    seen: list[tuple[int, int]] = []
    heldout_loss(model, examples(5), 0, tokens_per_batch=60, progress=lambda *at: seen.append(at))
    assert seen[-1] == (5, 5)
    assert model.training
    model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()


def test_nothing_trained() -> None:
    rows = [replace(row, trained=[False] * len(row.trained)) for row in examples(2)]
    with pytest.raises(DataError, match="no token of the held-out rows is trained"):
        heldout_loss(build("llama"), rows, 0)


def test_perplexity_too_large_for_a_float() -> None:
    assert HeldoutLoss(1000.0, 1).perplexity == math.inf


def test_batches_of_similar_length() -> None:
    assert length_batches([3, 9, 4, 9, 1], 18) == [[1, 3], [2, 0, 4]]
    assert length_batches([3, 9, 4, 9, 1], 18, rows=1) == [[1], [3], [2], [0], [4]]
    assert length_batches([50, 2], 18) == [[0], [1]]
    assert length_batches([], 18) == []
