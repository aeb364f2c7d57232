"""Batched generation against the model's own `generate`, token by token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fourbit.errors import ConfigError, DataError, ModelError
from fourbit.evaluate.context import Context
from fourbit.evaluate.generate import TextPieces, generate, stop_ids, stream
from fourbit.evaluate.sampling import Sampling
from fourbit.model.adapters import add_lora
from tests.evaluate.conftest import build, random_prompts
from tests.tiny import byte_tokenizer

NEW = 24


def own_answer(model: Any, prompt: list[int], stop: list[int], new: int = NEW) -> tuple[list[int], bool]:
    """What transformers generates for this prompt alone, and whether a stop token ended it."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )
    answer = output[0, len(prompt) :].tolist()
    return (answer[:-1], True) if answer[-1] in stop else (answer, False)


def frequent(model: Any, prompts: list[list[int]]) -> list[int]:
    """Two tokens that the model writes often, so that answers end at many lengths."""
    counts = Counter(token for prompt in prompts for token in own_answer(model, prompt, [2])[0])
    return [token for token, _ in counts.most_common(2)]


@pytest.mark.parametrize("kind", ["llama", "eager", "window", "mixed"])
@pytest.mark.parametrize("shared", [0, 12])
def test_greedy_answers_are_the_models_own(kind: str, shared: int) -> None:
    model, prompts = build(kind), random_prompts(17, shared)
    stop = frequent(model, prompts)
    expected = [own_answer(model, prompt, stop) for prompt in prompts]
    assert len({len(ids) for ids, _ in expected}) > 3
    assert {stopped for _, stopped in expected} == {True, False}
    answers = generate(model, prompts, stop, NEW, batch_size=7)
    assert [(answer.ids, answer.stopped) for answer in answers] == expected


def test_with_an_adapter() -> None:
    torch.manual_seed(3)
    model = add_lora(build("llama"), r=4, dropout=0.5, init_lora_weights=False)
    assert model.training  # so that dropout would show
    prompts = random_prompts(5, 0)
    answers = generate(model, prompts, [2], NEW)
    model.eval()
    assert [answer.ids for answer in answers] == [own_answer(model, prompt, [2])[0] for prompt in prompts]
    with model.disable_adapter():
        assert [answer.ids for answer in generate(model, prompts, [2], NEW)] != [
            answer.ids for answer in answers
        ]


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("llama"), random_prompts(16, 0)
    stop = frequent(model, prompts)
    rows_seen: list[int] = []
    extend = Context.extend

    def counting(self: Context, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows_seen.append(ids.shape[0])
        assert all(layer.keys.shape[0] in (ids.shape[0], 0) for layer in self.cache.layers)
        return extend(self, ids, *args, **kwargs)

    monkeypatch.setattr(Context, "extend", counting)
    answers = generate(model, prompts, stop, NEW, batch_size=16)
    longest = max(len(answer.ids) + answer.stopped for answer in answers)
    assert len(rows_seen) == longest
    for step, rows in enumerate(rows_seen[1:], start=1):
        live = sum(len(answer.ids) + answer.stopped > step for answer in answers)
        assert live <= rows < live + max(2, rows / 8 + 1)


def test_the_head_reads_its_weight_once() -> None:
    """A hidden state with gaps would make torch copy the head for every row."""
    model = build("llama")
    contiguous: list[bool] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: contiguous.append(args[0].is_contiguous()))
    generate(model, random_prompts(5, 12), [2], 3)
    assert len(contiguous) == 4
    assert all(contiguous)


def test_length_limit_and_stop_at_once() -> None:
    model, (prompt,) = build("llama"), random_prompts(1, 0)
    first = own_answer(model, prompt, [2])[0]
    (limited,) = generate(model, [prompt], [2], 5)
    assert (limited.ids, limited.stopped) == (first[:5], False)
    (empty,) = generate(model, [prompt], [first[0]], 5)
    assert (empty.ids, empty.stopped) == ([], True)


def test_go_on_ends_an_answer() -> None:
    model, prompts = build("llama"), random_prompts(4, 0)
    whole = generate(model, prompts, [2], NEW)
    cut = generate(model, prompts, [2], NEW, go_on=lambda index, ids: len(ids) <= index)
    assert [answer.ids for answer in cut] == [answer.ids[: index + 1] for index, answer in enumerate(whole)]
    assert not any(answer.stopped for answer in cut)


def test_progress_counts_up_to_all() -> None:
    seen: list[tuple[int, int]] = []
    generate(build("llama"), random_prompts(9, 0), [2], 3, batch_size=4, progress=lambda *at: seen.append(at))
    assert seen == [(done, 9) for done in range(1, 10)]


def test_no_prompts_no_answers() -> None:
    assert generate(build("llama"), [], [2], 3) == []


def test_an_empty_prompt_is_named() -> None:
    with pytest.raises(DataError, match="prompt 2 has no tokens"):
        generate(build("llama"), [[5], []], [2], 3)


def test_a_memory_other_than_a_cache_is_refused() -> None:
    model = build("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        generate(model, [[5]], [2], 3)


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    generate(model, random_prompts(2, 0), [2], 3)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"


class TestSampling:
    def test_independent_of_the_batch(self) -> None:
        model, prompts = build("llama"), random_prompts(9, 0)
        sampling = Sampling(temperature=1.5, top_p=0.95, top_k=40, seed=7)
        together = generate(model, prompts, [2], 8, sampling=sampling, batch_size=9)
        assert together == generate(model, prompts, [2], 8, sampling=sampling, batch_size=2)
        assert together != generate(
            model, prompts, [2], 8, sampling=Sampling(1.5, 0.95, 40, seed=8), batch_size=9
        )

    @pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-4)])
    def test_limits_are_greedy(self, sampling: Sampling) -> None:
        model, prompts = build("llama"), random_prompts(5, 0)
        assert generate(model, prompts, [2], 8, sampling=sampling) == generate(model, prompts, [2], 8)

    @pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (5, 0.8)])
    def test_frequencies(self, top_k: int, top_p: float) -> None:
        model, (prompt,), draws, temperature = build("llama"), random_prompts(1, 0), 4000, 4.0
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        expected = (logits.double() / temperature).softmax(-1)
        order = expected.argsort(descending=True)
        if top_k:
            expected[order[top_k:]] = 0
            expected /= expected.sum()
        before = expected[order].cumsum(0) - expected[order]
        expected[order[before >= top_p]] = 0
        expected /= expected.sum()
        answers = generate(
            model, [prompt] * draws, [], 1, sampling=Sampling(temperature, top_p, top_k), batch_size=1000
        )
        counts = torch.zeros_like(expected)
        for answer in answers:
            counts[answer.ids[0]] += 1
        assert counts[expected == 0].sum() == 0
        deviation = (draws * expected * (1 - expected)).sqrt()
        assert ((counts - draws * expected).abs() <= 5 * deviation + 1).all()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"temperature": -1.0}, "temperature is -1.0"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"top_p": 0.0}, "top_p is 0.0"),
            ({"top_p": 1.5}, "top_p is 1.5"),
            ({"top_k": -1}, "top_k is -1"),
        ],
    )
    def test_bad_settings(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Sampling(**wrong)


class TestStream:
    def test_pieces_are_the_batched_answer(self) -> None:
        model, tokenizer, (prompt,) = build("llama"), byte_tokenizer(), random_prompts(1, 0)
        (answer,) = generate(model, [prompt], [2], NEW)
        pieces = list(stream(model, tokenizer, prompt, [2], NEW))
        assert "".join(pieces) == tokenizer.decode(answer.ids, skip_special_tokens=True)

    def test_inference_mode_stays_inside(self) -> None:
        model, (prompt,) = build("llama"), random_prompts(1, 0)
        pieces = stream(model, byte_tokenizer(), prompt, [2], NEW)
        next(pieces)
        assert not torch.is_inference_mode_enabled()
        assert model.config._attn_implementation == "sdpa"

    def test_characters_stay_whole(self) -> None:
        tokenizer, text = byte_tokenizer(), "naïve café €5 \U0001f600 日本\n"
        pieces = TextPieces(tokenizer)
        given = [pieces.add(token) for token in tokenizer(text)["input_ids"]]
        assert "".join(given) == text
        assert all("\ufffd" not in piece for piece in given)
        assert len([piece for piece in given if piece]) == len(text)
        assert pieces.rest() == ""

    def test_an_unfinished_character_comes_last(self) -> None:
        tokenizer = byte_tokenizer()
        pieces = TextPieces(tokenizer)
        given = [pieces.add(token) for token in tokenizer("ok€")["input_ids"][:-1]]
        assert "".join(given) == "ok"
        assert pieces.rest() == "\ufffd"


def test_stop_ids_come_from_everywhere() -> None:
    model, tokenizer = build("llama"), byte_tokenizer()
    model.generation_config.eos_token_id = [40, 41]
    model.config.eos_token_id = 42
    tokenizer.eos_token = "<|pad|>"
    assert stop_ids(model, tokenizer) == {40, 41, 42, 0, 2}  # 2: the template's <|im_end|>
