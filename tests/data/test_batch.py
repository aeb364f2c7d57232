"""Batches: each row once, the same for the same seed, labels where the mask says."""

from __future__ import annotations

import pytest
import torch

from fourbit.data.batch import NO_LOSS, collate, effective_batches, micro_batches
from fourbit.data.render import Example


def example(ids: list[int], trained: list[int] | None = None, row: int = 0) -> Example:
    mask = [False] + [True] * (len(ids) - 1) if trained is None else [bool(value) for value in trained]
    return Example(ids, mask, row, f"f.jsonl:{row + 1}", mask.index(True))


def of_lengths(lengths) -> list[Example]:
    return [example(list(range(length)), row=row) for row, length in enumerate(lengths)]


LENGTHS = [2 + (index * 7919) % 97 for index in range(1003)]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("effective_batch", [1, 4, 16, 1003, 2000])
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 1003])
def test_an_epoch_covers_each_row_once(count, effective_batch, group):
    examples = of_lengths(LENGTHS[:count])
    batches = effective_batches(examples, effective_batch, seed=5, epoch=2, group_by_length=group)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert len(batches) == -(-count // effective_batch)
    assert all(len(batch) == effective_batch for batch in batches[:-1])
    assert batches == effective_batches(examples, effective_batch, seed=5, epoch=2, group_by_length=group)


@pytest.mark.parametrize("group", [False, True])
def test_seed_and_epoch_change_the_batches(group):
    examples = of_lengths(LENGTHS)
    seen = [
        frozenset(frozenset(batch) for batch in effective_batches(examples, 16, seed, epoch, group))
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    assert len(set(seen)) == 4  # not only their order: rows meet other rows


def test_batches_are_pinned():
    examples = of_lengths([3, 9, 5, 7, 2, 8, 6, 4])
    assert effective_batches(examples, 3, seed=0, epoch=0, group_by_length=False) == [
        [6, 4, 1],
        [3, 2, 7],
        [5, 0],
    ]
    grouped = effective_batches(of_lengths(LENGTHS), 334, seed=0, epoch=1, group_by_length=True)
    assert grouped[0][:8] == [740, 643, 934, 801, 413, 219, 86, 377]


def padding(examples: list[Example], batches: list[list[int]]) -> float:
    batched = [collate([examples[index] for index in batch], 0) for batch in batches]
    cells = sum(batch.input_ids.numel() for batch in batched)
    return 1 - sum(int(batch.attention_mask.sum()) for batch in batched) / cells


def test_grouping_saves_padding_and_short_steps_come_from_anywhere():
    examples = of_lengths(LENGTHS)
    plain, grouped = (effective_batches(examples, 16, 0, 0, group) for group in (False, True))
    assert padding(examples, plain) > 0.4
    assert padding(examples, grouped) < 0.2  # up to a quarter of it from rounding lengths
    means = [sum(LENGTHS[index] for index in batch) / len(batch) for batch in grouped]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_micro_batches_cut_a_step_by_length():
    examples = of_lengths([3, 9, 5, 7, 2, 8, 5, 4])
    assert micro_batches([0, 1, 2, 3, 4, 5, 6, 7], examples, 3) == [[1, 5, 3], [2, 6, 7], [0, 4]]
    assert micro_batches([6, 2], examples, 1) == [[6], [2]]  # equal lengths keep the step's order
    assert micro_batches([4, 1], examples, 8) == [[1, 4]]


def test_collate_pads_on_the_right_and_labels_come_from_the_mask():
    batch = collate([example([5, 6, 7, 9], [0, 0, 1, 1], row=3), example([5, 9], [0, 1], row=8)], pad_id=9)
    expected = {
        "input_ids": [[5, 6, 7, 9], [5, 9, 9, 9]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[NO_LOSS, NO_LOSS, 7, 9], [NO_LOSS, 9, NO_LOSS, NO_LOSS]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 2, 3]],
        "rows": [3, 8],
    }
    for name, values in expected.items():
        tensor = getattr(batch, name)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
        assert tensor.tolist() == values
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in expected)


def test_shifted_labels_are_the_next_tokens(make_tokenizer, settings, row):
    """The loss at position t predicts token t + 1: exactly the trained tokens, and the eos after the last."""
    from fourbit.data.encode import encode

    tokenizer = make_tokenizer(pad="</s>")
    rows = [
        row(1, prompt="hello:", completion=" no"),
        row(2, prompt="z", completion="zz"),
        row(3, text="hello"),
    ]
    examples = encode(rows, tokenizer, settings()).examples
    batch = collate(examples, tokenizer.pad_token_id)
    targets = batch.labels[:, 1:]
    carries = targets != NO_LOSS
    assert torch.equal(targets[carries], batch.input_ids[:, 1:][carries])
    assert carries.sum().item() == sum(sum(item.trained) for item in examples)
    for index, item in enumerate(examples):
        last = len(item.input_ids) - 1
        assert targets[index, last - 1].item() == tokenizer.eos_token_id
        assert (targets[index, last:] == NO_LOSS).all()


def test_the_loss_of_a_batch_is_that_of_its_rows_alone():
    """transformers shifts labels itself; with token weights padding and neighbours change nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    examples = [
        example([1, 3, 4, 5, 2], [0, 0, 1, 1, 1]),
        example([1, 6, 2], [0, 0, 1]),
        example([1, 7, 8, 2]),
    ]

    def total(group: list[Example]) -> torch.Tensor:
        batch = collate(group, pad_id=2)
        loss = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            labels=batch.labels,
        ).loss
        return loss * (batch.labels != NO_LOSS).sum()

    with torch.no_grad():
        assert torch.allclose(total(examples), sum(total([item]) for item in examples), rtol=1e-12, atol=0)
