"""min_p and the repetition penalty against transformers' own processors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from fourbit.errors import ConfigError
from fourbit.evaluate.generate import generate
from fourbit.evaluate.sampling import Sampling, next_tokens
from tests.evaluate.conftest import build, random_prompts


def some_logits() -> torch.Tensor:
    return 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("min_p", [0.05, 0.5, 1.0])
def test_min_p(min_p: float) -> None:
    logits, draw = some_logits(), random.Random(0)
    allowed = MinPLogitsWarper(min_p)(torch.zeros(1, 0), logits / 2.0).isfinite()[0]
    counts = torch.zeros(50)
    for _ in range(2000):
        counts[next_tokens(logits, Sampling(2.0, min_p=min_p), [draw])[0]] += 1
    assert counts[~allowed].sum() == 0
    expected = 2000 * torch.where(allowed, (logits[0] / 2.0).exp(), 0.0)
    expected = 2000 * expected / expected.sum()
    assert ((counts - expected).abs() <= 5 * expected.sqrt() + 1).all()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 8.0])
def test_repetition_penalty(penalty: float) -> None:
    logits = some_logits()
    order = logits[0].argsort(descending=True)
    seen = [[*order[:3].tolist(), int(order[-1]), int(order[0])]]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(seen), logits.clone())
    before = logits.clone()
    assert next_tokens(logits, Sampling(repetition_penalty=penalty), [None], seen) == [int(expected.argmax())]
    assert torch.equal(logits, before)


def test_the_penalty_is_that_of_transformers_in_whole_answers() -> None:
    model, prompts = build("llama"), random_prompts(5, 0)
    answers = generate(model, prompts, [2], 12, sampling=Sampling(repetition_penalty=3.0))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=3.0,
        )[0, len(prompt) :].tolist()
        assert answer.ids == [token for token in expected if token != 2]
    assert answers != generate(model, prompts, [2], 12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**wrong)
