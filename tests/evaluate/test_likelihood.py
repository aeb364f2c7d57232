"""The search for the most likely label against scoring every label."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourbit.errors import DataError
from fourbit.evaluate.context import Context, inference, prefill
from fourbit.evaluate.generate import answer_batch, generate
from fourbit.evaluate.likelihood import LabelSearch, most_likely
from fourbit.evaluate.trie import LabelTrie
from tests.evaluate.conftest import build, random_prompts

END = 2


def random_labels(count: int, seed: int, alphabet: int = 6, longest: int = 7) -> list[list[int]]:
    """Distinct labels over few tokens, so that they share beginnings, each with the end of turn."""
    generator = torch.Generator().manual_seed(seed)
    found: set[tuple[int, ...]] = set()
    while len(found) < count:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        found.add(tuple(torch.randint(3, 3 + alphabet, (length,), generator=generator).tolist()))
    return [[*label, END] for label in sorted(found)]


def brute_force(model: Any, prompt: list[int], labels: list[list[int]]) -> list[float]:
    """The log-probability of every label, each in a forward pass of its own."""
    scores = []
    for label in labels:
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + label])).logits[0].double().log_softmax(-1)
        scores.append(sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(label)))
    return scores


@pytest.mark.parametrize("kind", ["llama", "eager", "window", "mixed"])
@pytest.mark.parametrize(("seed", "shared", "batch_size"), [(0, 0, 5), (1, 12, 16), (2, 12, 1)])
def test_exactly_the_most_likely(kind: str, seed: int, shared: int, batch_size: int) -> None:
    model, labels = build(kind, seed), random_labels(40, seed)
    prompts = random_prompts(11, shared, seed)
    choices = most_likely(model, prompts, labels, batch_size=batch_size)
    assert len(choices) == len(prompts)
    for prompt, choice in zip(prompts, choices, strict=True):
        scores = brute_force(model, prompt, labels)
        assert choice.label == max(range(len(labels)), key=scores.__getitem__)
        assert choice.log_prob == pytest.approx(scores[choice.label], abs=1e-4)
    assert len({choice.label for choice in choices}) > 1


@pytest.mark.parametrize("kind", ["llama", "mixed"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_whether_the_wanted_label_is_the_most_likely(kind: str, batch_size: int) -> None:
    """Some are, some are not, one has a single token, and for some prompts no label is wanted."""
    model, labels, prompts = build(kind, 5), [*random_labels(30, 5), [END]], random_prompts(14, 12, 5)
    scores = [brute_force(model, prompt, labels) for prompt in prompts]
    best = [max(range(len(labels)), key=values.__getitem__) for values in scores]
    short = len(labels) - 1
    wanted = [[label, (label + 1) % short, None, short][i % 4] for i, label in enumerate(best)]
    choices = most_likely(model, prompts, labels, wanted=wanted, batch_size=batch_size)
    for choice, asked, true, values in zip(choices, wanted, best, scores, strict=True):
        if asked in (None, true):
            assert choice.label == true
            assert choice.log_prob == pytest.approx(values[true], abs=1e-4)
        else:
            assert choice.label is None
            assert choice.log_prob > values[asked]
            assert min(abs(choice.log_prob - value) for value in values) < 1e-4
    assert sum(choice.label is None for choice in choices) >= 4


def count_read(
    model: Any,
    prompts: list[list[int]],
    labels: list[list[int]],
    monkeypatch: Any,
    wanted: list[int | None] | None = None,
) -> int:
    """How many prefixes of labels the search appends to the cache."""
    read = 0
    extend = Context.extend

    def counting(self: Context, ids: Any, positions: Any, visible: Any = None, last: int = 0) -> Any:
        nonlocal read
        read += int((positions >= 0).sum()) if visible is not None else 0
        return extend(self, ids, positions, visible, last)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "extend", counting)
        most_likely(model, prompts, labels, wanted=wanted, batch_size=4)
    return read


def test_a_label_that_is_beaten_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, labels = build("llama"), random_prompts(12, 0), random_labels(60, 6, alphabet=12)
    found = [choice.label for choice in most_likely(model, prompts, labels)]
    assert None not in found
    other: list[int | None] = [(label + 1) % len(labels) for label in found if label is not None]
    whole = count_read(model, prompts, labels, monkeypatch)
    assert count_read(model, prompts, labels, monkeypatch, other) < 0.5 * whole
    assert count_read(model, prompts, labels, monkeypatch, list(found)) < 1.5 * whole


def test_what_cannot_win_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("llama"), random_prompts(6, 0)
    answers = [[*answer.ids, END] for answer in generate(model, prompts, [], 6)]
    labels = [
        list(label) for label in {tuple(label) for label in [*answers, *random_labels(40, 4, alphabet=9)]}
    ]
    trie = LabelTrie(labels)
    needed = 0  # by any exact search: prefixes likelier than the best label
    for prompt in prompts:
        best = max(brute_force(model, prompt, labels))
        with torch.no_grad():
            paths = {tuple(label[:n]) for label in labels for n in range(1, len(label))}
        needed += sum(brute_force(model, prompt, [list(path)])[0] > best for path in paths)
    read = count_read(model, prompts, labels, monkeypatch)
    inner = int((trie.children > 0).sum()) - 1
    assert needed <= read < 0.8 * inner * len(prompts)


def test_one_label_is_scored_whole() -> None:
    model, (prompt,) = build("llama"), random_prompts(1, 0)
    (choice,) = most_likely(model, [prompt], [[5, 6, 7, END]])
    assert choice.label == 0
    assert choice.log_prob == pytest.approx(brute_force(model, prompt, [[5, 6, 7, END]])[0], abs=1e-4)


def test_one_prefill_serves_search_and_generation() -> None:
    model, prompts, labels = build("llama"), random_prompts(6, 12), random_labels(20, 3)
    with inference(model):
        ((indices, context),) = prefill(model, prompts, 8)
        choices = dict(LabelSearch(LabelTrie(labels)).choose(indices, context.fork()))
        answers = dict(answer_batch(context, indices, [END], 10))
    assert [choices[index] for index in range(6)] == most_likely(model, prompts, labels, batch_size=8)
    assert [answers[index] for index in range(6)] == generate(model, prompts, [END], 10, batch_size=8)


def test_progress_counts_up_to_all() -> None:
    seen: list[tuple[int, int]] = []
    labels = random_labels(8, 0)
    most_likely(
        build("llama"), random_prompts(7, 0), labels, batch_size=3, progress=lambda *at: seen.append(at)
    )
    assert seen == [(done, 7) for done in range(1, 8)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "at least one"),
        ([[5, END], []], "none of them empty"),
        ([[5, 6], [5, 7], [5, 6]], "number 1 and number 3 have the same tokens"),
        ([[5, 6, 7], [5, 6]], "number 2 and number 1 have the same tokens, or one begins the other"),
    ],
)
def test_labels_that_cannot_be_told_apart(labels: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelTrie(labels)


def test_the_tree() -> None:
    trie = LabelTrie([[4, 5, 6], [4, 7], [8]])
    #        root   4  8  5  7  6
    assert trie.tokens.tolist() == [0, 4, 8, 5, 7, 6]
    assert trie.depth.tolist() == [0, 1, 1, 2, 2, 3]
    assert trie.ends.tolist() == [5, 4, 2]
    source, child = trie.edges(torch.tensor([1, 2, 0, 3]))
    assert source.tolist() == [0, 0, 2, 2, 3]
    assert child.tolist() == [3, 4, 1, 2, 5]
    paths = [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 4}, {0, 1, 3, 5}, set()]
    assert [set(row.nonzero().squeeze(1).tolist()) for row in trie.ancestors] == paths
