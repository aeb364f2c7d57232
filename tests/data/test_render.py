"""Rows of models without a chat template: prompt and completion, Alpaca, documents; and odd tokenizers."""
# ruff: noqa: E501 - messages stand on one line, as they are printed

from __future__ import annotations

from itertools import pairwise

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from fourbit.data.encode import encode, prompt_only
from fourbit.data.render import render
from fourbit.errors import DataError

TO_THE_END = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


def error_of(call) -> str:
    with pytest.raises(DataError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_completion_and_eos_are_trained(adds_bos, make_tokenizer, settings, row, expected):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    example = render(row(prompt="hello\n", completion="fine"), tokenizer, settings())
    bos = "<s>" if adds_bos else ""
    assert (example.input_ids, example.trained) == expected(tokenizer, f"{bos}hello\n«fine</s>»")
    assert example.prompt_tokens == len(example.input_ids) - len("fine") - 1


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "marked"),
    [
        ("hello", " yes", "hello« yes</s>»"),
        ("hello:", " no", "hello«: no</s>»"),  # one token of prompt and answer
        ("hello:", " x", "hello«: x</s>»"),  # a token of which the answer has the space alone
        ("hello\n", "a ", "hello\n«a </s>»"),  # a space ends the answer
        ("hello ", "yes", "hello« yes</s>»"),  # spaces that end a prompt belong to the answer
        ("hello  ", "42", "hello«  42</s>»"),
        ("hello\n", "ok", "hello«\nok</s>»"),
        ("☃", "☃", "☃«☃</s>»"),
        ("", "hello", "«hello</s>»"),
    ],
)
def test_answers_that_merge_with_their_prompt(
    prompt, completion, marked, trims, make_tokenizer, settings, row, expected
):
    tokenizer = make_tokenizer(trims_offsets=trims)
    example = render(row(prompt=prompt, completion=completion), tokenizer, settings())
    ids, trained = expected(tokenizer, marked)
    assert (example.input_ids, example.trained) == (ids, [False, *trained[1:]])


def test_the_prompt_at_inference_ends_where_the_answer_begins(make_tokenizer, settings, row):
    tokenizer = make_tokenizer(adds_bos=True)
    item = row(prompt="hello ", completion="yes")
    example = render(item, tokenizer, settings())
    ids, reference = prompt_only(item, tokenizer, settings())
    assert ids == example.input_ids[: example.prompt_tokens]
    assert tokenizer.decode(ids) == "<s>hello"
    assert reference == "yes"


def test_instructions_stand_in_the_alpaca_prompt(make_tokenizer, settings, row, expected):
    tokenizer = make_tokenizer()
    without = render(row(instruction="Say hello", output="hello", input=""), tokenizer, settings())
    head = "Below is an instruction that describes a task"
    tail = "Write a response that appropriately completes the request.\n\n### Instruction:\nSay hello\n\n"
    assert (without.input_ids, without.trained) == expected(
        tokenizer, f"{head}. {tail}### Response:« hello</s>»"
    )
    with_input = render(row(instruction="Say hello", input="{world}", output="hello"), tokenizer, settings())
    assert (with_input.input_ids, with_input.trained) == expected(
        tokenizer,
        f"{head}, paired with an input that provides further context. {tail}"
        "### Input:\n{world}\n\n### Response:« hello</s>»",
    )


@pytest.mark.parametrize(("extra", "turn"), [("world", "hello\n\nworld"), ("", "hello"), (None, "hello")])
def test_instructions_are_the_user_turn_of_a_chat_model(extra, turn, make_tokenizer, settings, row, expected):
    tokenizer = make_tokenizer(TO_THE_END)
    example = render(row(instruction="hello", input=extra, output="fine"), tokenizer, settings())
    assert (example.input_ids, example.trained) == expected(tokenizer, f"{turn}«fine</s>»")


def test_loss_on_everything_but_bos(make_tokenizer, settings, row):
    tokenizer = make_tokenizer(adds_bos=True)
    example = render(row(prompt="hello", completion="fine"), tokenizer, settings(loss="all"))
    assert example.trained == [False] + [True] * (len(example.input_ids) - 1)


def test_eos_is_trained_where_it_is_the_pad_token(make_tokenizer, settings, row):
    tokenizer = make_tokenizer(pad="</s>")
    example = render(row(prompt="hello", completion="fine"), tokenizer, settings())
    assert example.input_ids[-1] == tokenizer.pad_token_id
    assert example.trained[-1]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 14, 15, 16, 100])
def test_documents_are_chunked_and_every_token_is_predicted_once(
    length, adds_bos, make_tokenizer, settings, row
):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    documents = [("z" * length), "xy"]
    encoded = encode(
        [row(n, text=text) for n, text in enumerate(documents, 1)], tokenizer, settings(max_length=8)
    )
    bos, eos = [tokenizer.bos_token_id] if adds_bos else [], tokenizer.eos_token_id
    for number, text in enumerate(documents, start=1):
        chunks = [example for example in encoded.examples if example.source == f"f.jsonl:{number}"]
        whole = [*bos, *tokenizer(text, add_special_tokens=False)["input_ids"], eos]
        assert chunks[0].input_ids[0] == whole[0]
        assert [id_ for chunk in chunks for id_ in chunk.input_ids[1:]] == whole[1:]
        for chunk, following in pairwise(chunks):
            assert len(chunk.input_ids) == 8
            assert following.input_ids[0] == chunk.input_ids[-1]
        for chunk in chunks:
            assert chunk.trained == [False] + [True] * (len(chunk.input_ids) - 1)
    assert encoded.dropped == {}
    assert encoded.trained_tokens == sum(len(text) + len(bos) for text in documents)


def sentencepiece(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: a word mark before every text and after every special token, bytes for the rest."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abehlnosy",
        "ye",
        "yes",
        "▁yes",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", "<a>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ("yes", ["<s>", "▁", "h", "a", "<a>", "*▁yes", "*</s>"]),
        (
            "no",
            ["<s>", "▁", "h", "a", "<a>", "*▁", "*n", "*o", "*</s>"],
        ),  # the model writes the lone word mark
        ("☃", ["<s>", "▁", "h", "a", "<a>", "*▁", "*<0xE2>", "*<0x98>", "*<0x83>", "*</s>"]),
    ],
)
def test_word_marks_and_bytes_of_an_answer_are_trained(answer, tokens, settings, row):
    tokenizer = sentencepiece(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '<a>' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    example = render(row(prompt="ha", completion=answer), tokenizer, settings())
    spelled = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert [
        f"*{token}" if on else token for token, on in zip(spelled, example.trained, strict=True)
    ] == tokens


class TestErrors:
    def test_chat_without_a_template(self, make_tokenizer, settings, row):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert error_of(lambda: render(row(3, messages=messages), make_tokenizer(), settings())) == (
            "f.jsonl:3: chat messages need a model with a chat template and this one has none; use an instruct model or "
            "prompt and completion columns"
        )

    def test_system_without_a_template(self, make_tokenizer, settings, row):
        item = row(prompt="a", completion="b")
        assert error_of(lambda: render(item, make_tokenizer(), settings(system="x"))) == (
            "data.system needs a chat template and this model has none; put it into the prompts"
        )

    def test_no_eos(self, make_tokenizer, settings, row):
        item = row(prompt="a", completion="b")
        assert error_of(lambda: render(item, make_tokenizer(eos=None), settings())) == (
            "the tokenizer has no eos token, so the model could not learn to stop; set tokenizer.eos_token"
        )

    def test_no_trained_token(self, make_tokenizer, settings, row):
        """A normalizer that removes both the answer and what ends the turn leaves nothing to train on."""
        tokenizer = make_tokenizer(
            TO_THE_END.replace("eos_token", "'zz'"), normalizer=normalizers.Replace("z", "")
        )
        assert error_of(lambda: render(row(5, prompt="a", completion="z"), tokenizer, settings())) == (
            "f.jsonl:5: no token of the row is trained; give it an answer or remove it"
        )

    def test_a_tokenizer_without_offsets(self, make_tokenizer, settings, row, monkeypatch):
        tokenizer = make_tokenizer()
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        assert error_of(lambda: render(row(prompt="a", completion="b"), tokenizer, settings())) == (
            f"the tokenizer {type(tokenizer).__name__} keeps no character offsets, so answers cannot be masked exactly; "
            "load it with use_fast=True"
        )

    def test_a_document_has_no_prompt(self, make_tokenizer, settings, row):
        assert error_of(lambda: prompt_only(row(2, text="a"), make_tokenizer(), settings())) == (
            "f.jsonl:2: plain text has no prompt and no answer; use prompt and completion columns"
        )
