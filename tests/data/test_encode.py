"""The account of all rows, the split, the sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourbit.data.encode import encode, prompt_only, sample, split
from fourbit.data.order import permutation
from fourbit.data.read import read_rows
from fourbit.errors import DataError

TEST_CSV = Path(__file__).parents[2] / "demo" / "banking77" / "test.csv"


def test_long_rows_are_dropped_and_counted_never_cut(make_tokenizer, settings, row):
    tokenizer = make_tokenizer()
    rows = [row(line, prompt="z" * size, completion="z") for line, size in enumerate([6, 7, 14, 4], start=1)]
    encoded = encode(rows, tokenizer, settings(max_length=8))
    assert [(example.source, example.row, len(example.input_ids)) for example in encoded.examples] == [
        ("f.jsonl:1", 0, 8),
        ("f.jsonl:4", 1, 6),
    ]
    assert encoded.dropped == {"longer than 8 tokens": 2}
    assert encoded.summary() == (
        "4 rows (prompt_completion): 2 examples, 14 tokens, 4 trained, longest 8; "
        "dropped: 2 longer than 8 tokens"
    )


def test_forms_may_be_mixed(make_tokenizer, settings, row):
    rows = [row(1, text="z" * 9), row(2, prompt="z", completion="z"), row(3, text="z")]
    encoded = encode(rows, make_tokenizer(), settings(max_length=8))
    assert encoded.forms == {"text": 2, "prompt_completion": 1}
    assert [example.source for example in encoded.examples] == [
        "f.jsonl:1",
        "f.jsonl:1",
        "f.jsonl:2",
        "f.jsonl:3",
    ]
    assert [example.row for example in encoded.examples] == [0, 1, 2, 3]
    assert encoded.summary() == (
        "3 rows (2 text, 1 prompt_completion): 4 examples, 16 tokens, 12 trained, longest 8; dropped: none"
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "there are no rows to train on; give a file with at least one"),
        (
            [50, 1998],
            "every row is longer than data.max_length, 8 tokens (the longest has 2,000); raise it",
        ),
    ],
)
def test_nothing_left(sizes, message, make_tokenizer, settings, row):
    rows = [row(prompt="z" * size, completion="z") for size in sizes]
    with pytest.raises(DataError) as error:
        encode(rows, make_tokenizer(), settings(max_length=8))
    assert str(error.value) == message


def test_smollm2_on_real_requests(smollm2, settings):
    """The demo's data under its model's own tokenizer and template, every token of every row."""
    wanted = settings(prompt="{text}", completion="{category}")
    rows = read_rows([TEST_CSV], wanted)[:300]
    encoded = encode(rows, smollm2, wanted)
    assert encoded.dropped == {}
    for item, example in zip(rows, encoded.examples, strict=True):
        turns = [{"role": "user", "content": item.fields["text"]}]
        prompt, reference = prompt_only(item, smollm2, wanted)
        assert prompt == smollm2.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert reference == item.fields["category"]
        answer = smollm2(f"{reference}<|im_end|>", add_special_tokens=False)["input_ids"]
        newline = smollm2("\n", add_special_tokens=False)["input_ids"]
        assert example.input_ids == [*prompt, *answer, *newline]
        assert example.trained == [False] * len(prompt) + [True] * len(answer) + [False]
        assert example.source == item.source
    assert encoded.trained_tokens == sum(sum(example.trained) for example in encoded.examples)


def test_smollm2_turns_token_by_token(smollm2, settings, row):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Olá 🤗"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no."},
    ]
    example = encode([row(messages=messages)], smollm2, settings(system="Be kind")).examples[0]
    shown = [
        ("*" if on else "") + token
        for token, on in zip(smollm2.convert_ids_to_tokens(example.input_ids), example.trained, strict=True)
    ]
    assert shown == [
        "<|im_start|>", "system", "Ċ", "Be", "Ġkind", "<|im_end|>", "Ċ",
        "<|im_start|>", "user", "Ċ", "hi", "<|im_end|>", "Ċ",
        "<|im_start|>", "ass", "istant", "Ċ", "*Ol", "*Ã¡", "*ĠðŁ", "*¤", "*Ĺ", "*<|im_end|>", "Ċ",
        "<|im_start|>", "user", "Ċ", "more", "<|im_end|>", "Ċ",
        "<|im_start|>", "ass", "istant", "Ċ", "*no", "*.", "*<|im_end|>", "Ċ",
    ]  # fmt: skip


class TestSplit:
    def test_every_item_once_in_its_order(self):
        train, heldout = split(range(100), 0.05, seed=0)
        assert len(heldout) == 5
        assert train == sorted(train)
        assert heldout == sorted(heldout)
        assert sorted(train + heldout) == list(range(100))

    def test_it_is_the_same_everywhere_and_differs_by_seed(self):
        assert split(range(20), 0.25, seed=0)[1] == [3, 6, 11, 14, 17]
        assert split(range(20), 0.25, seed=1)[1] != [3, 6, 11, 14, 17]

    @pytest.mark.parametrize(
        ("count", "fraction", "held"),
        [(10, 0, 0), (1, 0, 0), (10, 0.01, 1), (2, 0.99, 1), (30, 0.05, 2), (0, 0, 0)],
    )
    def test_sizes(self, count, fraction, held):
        train, heldout = split(list(range(count)), fraction, seed=3)
        assert (len(train), len(heldout)) == (count - held, held)

    def test_one_row(self):
        with pytest.raises(DataError) as error:
            split(["a"], 0.05, seed=0)
        assert str(error.value) == "one row cannot be split; add rows or set data.heldout_fraction to 0"


def test_sample():
    assert sample(range(10), 3, seed=0) == sorted(set(sample(range(10), 3, seed=0)))
    assert len(sample(range(10), 3, seed=0)) == 3
    assert sample(range(10), 10, seed=0) == sample(range(10), 99, seed=0) == list(range(10))
    assert sample(range(1000), 500, seed=0) != sample(range(1000), 500, seed=1)


def test_permutations_are_pinned():
    """Other numbers would mean other batches for the same seed: a resumed run would be another run."""
    assert permutation(10, 0) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert permutation(10, 0, 1) == [1, 3, 8, 6, 2, 0, 7, 5, 4, 9]
    assert sorted(permutation(1000, 7, 2, 3)) == list(range(1000))
    assert permutation(0, 0) == []
