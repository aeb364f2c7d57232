"""Scores of rows against the model's own logits, whatever shares a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fourbit.config import DataSettings
from fourbit.data.encode import encode
from fourbit.data.render import Example
from fourbit.data.row import Row
from fourbit.exporting import scoring
from fourbit.exporting.scoring import answer_ids, score_rows
from tests.tiny import byte_tokenizer, llama

ROWS = [
    Row({"prompt": "a" * length, "completion": word}, "rows.jsonl", length)
    for length, word in ((1, "red"), (9, "a longer answer"), (4, "x"), (30, "blue"), (2, "green"))
]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return encode(ROWS, byte_tokenizer(), DataSettings(train=("rows.jsonl",))).examples


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama().eval()


def expected(model: Any, example: Example) -> tuple[float, tuple[int, ...]]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    places = [place for place, trained in enumerate(example.trained) if trained]
    loss = -sum(
        float(torch.log_softmax(logits[place - 1], dim=-1)[example.input_ids[place]]) for place in places
    )
    return loss, tuple(int(logits[place - 1].argmax()) for place in places)


@pytest.mark.parametrize("tokens", [1, 60, 100_000])
def test_scores(
    tokens: int, model: nn.Module, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row a batch, some, and all of them at once."""
    monkeypatch.setattr(scoring, "_LOGIT_BYTES", 4 * len(byte_tokenizer()) * tokens)
    seen: list[tuple[int, int]] = []
    scores = score_rows(model, examples, lambda *at: seen.append(at))
    for score, example in zip(scores, examples, strict=True):
        loss, top1 = expected(model, example)
        assert score.loss == pytest.approx(loss, abs=1e-4)
        assert score.top1 == top1
    assert seen[-1] == (5, 5)
    assert len(seen) == {1: 5, 60: 5, 100_000: 1}[tokens] or tokens == 60


def test_a_model_that_computes_all_logits(model: Any, examples: list[Example]) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

        def get_output_embeddings(self) -> Any:
            return self.inner.get_output_embeddings()

    for one, other in zip(score_rows(Whole(), examples), score_rows(model, examples), strict=True):
        assert one.top1 == other.top1
        assert one.loss == pytest.approx(other.loss, abs=1e-4)


def test_answer_ids(examples: list[Example]) -> None:
    ids = byte_tokenizer()("red<|im_end|>")["input_ids"]
    assert answer_ids(examples[0]) == ids
