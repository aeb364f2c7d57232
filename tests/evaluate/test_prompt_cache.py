"""A text that goes on from what was read gives the logits of reading everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourbit.errors import DataError, ModelError
from fourbit.evaluate import prompt_cache
from fourbit.evaluate.context import inference
from fourbit.evaluate.prompt_cache import PromptCache
from tests.evaluate.conftest import build


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 200, (count,), generator=generator).tolist()


def whole(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([ids])).logits[:, -1]
    return result


@pytest.mark.parametrize("kind", ["llama", "eager", "window", "mixed"])
def test_as_if_read_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "_TOKENS", 7)
    model, cache, first = build(kind), PromptCache(), tokens(20)
    texts = [
        (first, 20),
        ([*first, *tokens(15, 1)], 15),  # goes on
        ([*first, *tokens(3, 2)], 3),  # goes back and on
        (first[:11], 1),  # goes back
        (first, 9),
        (first, 1),  # the same again
        (tokens(5, 3), 5),  # another text
    ]
    for ids, new in texts:
        before = cache.tokens_read
        with inference(model):
            found = cache.read(model, ids)
        torch.testing.assert_close(found, whole(model, ids), rtol=1e-4, atol=1e-4)
        assert cache.tokens_read - before == new


@pytest.mark.parametrize("fails_at", [0, 1])
def test_an_interruption_leaves_it_usable(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second layer, when the first has taken the new tokens in already."""
    model, cache = build("llama"), PromptCache()
    layer, forward = model.model.layers[1], model.model.layers[1].forward
    prompts = [tokens(6), [*tokens(6), *tokens(4, 1)]]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for number, ids in enumerate(prompts):
        if number == fails_at:
            monkeypatch.setattr(layer, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt), inference(model):
                cache.read(model, ids)
            monkeypatch.setattr(layer, "forward", forward)
        with inference(model):
            torch.testing.assert_close(cache.read(model, ids), whole(model, ids), rtol=1e-4, atol=1e-4)


def test_nothing_to_read() -> None:
    with pytest.raises(DataError, match="has no tokens"):
        PromptCache().read(build("llama"), [])


def test_a_memory_other_than_a_cache_is_refused() -> None:
    model = build("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        PromptCache().read(model, [5])
