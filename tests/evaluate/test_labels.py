from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fourbit.config import DataSettings
from fourbit.data.encode import prompt_only
from fourbit.data.render import render
from fourbit.data.row import Row
from fourbit.errors import DataError
from fourbit.evaluate.labels import answer_ids, end_of_turn
from tests.tiny import byte_tokenizer

SETTINGS = DataSettings(train=("f.csv",))


def fields(form: str, answer: str) -> dict[str, Any]:
    if form == "pair":
        return {"prompt": "Is it red?", "completion": answer}
    if form == "columns":
        return {"q": "red", "a": answer}
    if form == "instruction":
        return {"instruction": "Say it", "input": "twice", "output": answer}
    turns = [("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TEMPLATES = {"prompt": "Is it {q}?", "completion": "{a}"}


@pytest.mark.parametrize(
    ("form", "chat", "changes"),
    [
        ("pair", True, {"system": "Answer."}),
        ("pair", False, {}),
        ("columns", True, TEMPLATES),
        ("columns", False, TEMPLATES),
        ("instruction", True, {"loss": "all"}),
        ("instruction", False, {}),  # its prompt ends in a space, which then begins the answer
        ("messages", True, {}),
    ],
)
def test_labels_are_what_training_trains(form: str, chat: bool, changes: dict[str, str]) -> None:
    tokenizer, settings = byte_tokenizer(chat), SETTINGS.model_copy(update=changes)
    row = Row(fields(form, "no"), "f.csv", 1)
    prompt, _ = prompt_only(row, tokenizer, settings)
    found = answer_ids(["no", "yes"], row, tokenizer, settings)
    for answer, ids in zip(("no", "yes"), found, strict=True):
        example = render(Row(fields(form, answer), "f.csv", 1), tokenizer, settings)
        after = example.input_ids[len(prompt) :]
        assert example.input_ids[: len(prompt)] == prompt
        assert ids == after[: after.index(2) + 1]
        assert tokenizer.decode(ids).strip() == f"{answer}<|im_end|>"


def test_end_of_turn() -> None:
    assert end_of_turn(byte_tokenizer()) == 2
    assert end_of_turn(byte_tokenizer(chat=False)) == 2


def test_an_answer_that_merges_with_its_prompt() -> None:
    pieces = {symbol: index for index, symbol in enumerate(["<eos>", "a", "b", "x", "ab"])}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    row = Row({"prompt": "xa", "completion": "x"}, "f.csv", 3)
    assert answer_ids(["xb"], row, tokenizer, SETTINGS) == [[3, 2, 0]]
    with pytest.raises(DataError, match=r"f.csv:3: the answer 'b' merges with the last token of the prompt"):
        answer_ids(["b"], row, tokenizer, SETTINGS)


def test_plain_text_has_no_prompt() -> None:
    with pytest.raises(DataError, match=r"f.txt:1: plain text has no prompt"):
        answer_ids(["b"], Row({"text": "words"}, "f.txt", 1), byte_tokenizer(), SETTINGS)
