"""Conversations: the same answers as reading everything again, histories, speakers, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import fourbit
from fourbit.config import DataSettings
from fourbit.data.forms import form_of
from fourbit.data.read import read_rows
from fourbit.errors import ConfigError, DataError
from fourbit.evaluate.context import transformers_model
from fourbit.evaluate.conversation import Conversation
from fourbit.evaluate.generate import decode, generate, stop_ids
from fourbit.evaluate.sampling import Sampling
from fourbit.model.adapter_set import BASE, AdapterSet
from fourbit.model.adapters import add_lora, load_adapter
from fourbit.model.load import load
from tests.evaluate.conftest import build
from tests.tiny import byte_tokenizer

Open = Callable[..., Conversation]
QUESTIONS = ("sky?", "grass?", "and snow?", "what of blood?")


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    """Three adapters that answer otherwise, one of them with DoRA and a head of its own."""
    options: dict[str, Any] = {"a": {}, "lora": {"rslora": True}, "b.c": {"use_dora": True}}
    folders = {}
    for number, (name, more) in enumerate(options.items()):
        saved = ["lm_head"] if name == "b.c" else []
        model = add_lora(
            build("llama"), r=4, seed=number, init_lora_weights=False, modules_to_save=saved, **more
        )
        folders[name] = tmp_path / f"adapter-{number}"
        model.save_pretrained(str(folders[name]), save_embedding_layers=False)
    return folders


@pytest.fixture
def converse(model_folder: str, adapters: dict[str, Path]) -> Open:
    """converse("a", system="...") gives a conversation with a base of its own and these adapters."""

    def start(*names: str, quant_type: str = "none", **options: Any) -> Conversation:
        base, tokenizer = load(model_folder, quant_type=quant_type, compute_dtype="float32")
        several = AdapterSet(base)
        for name in names:
            several.add(name, adapters[name])
        return Conversation(several, tokenizer, **{"max_new_tokens": 12, **options})

    return start


def said(answers: Iterator[tuple[str, str]]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, piece in answers:
        texts[name] = texts.get(name, "") + piece
    return texts


def read_again(chat: Conversation, speaker: str, count: int = 12) -> str:
    """The answer to the turns so far by a model that has read nothing yet."""
    text = chat.tokenizer.apply_chat_template(chat._messages(), tokenize=False, add_generation_prompt=True)
    prompt = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    with chat.adapters.using(speaker) as model:
        (answer,) = generate(model, [prompt], stop_ids(model, chat.tokenizer), count)
    return decode(chat.tokenizer, answer.ids)


@pytest.mark.parametrize("quant_type", ["none", "nf4"])
def test_the_cache_changes_no_answer(converse: Open, quant_type: str) -> None:
    """Speakers change, a turn is taken back: every answer is that of reading all turns from the start."""
    chat = converse("a", "lora", quant_type=quant_type, system="Be brief.")
    for number, question in enumerate(QUESTIONS):
        chat.use(("a", BASE, "lora", "a")[number])
        if number == 2:
            chat.undo()
        said(chat.answer(question))
        turns = chat.turns.copy()
        chat.turns.pop()
        assert read_again(chat, chat.speaker) == turns[-1]["content"]
        chat.turns = turns
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 3


def test_a_turn_costs_its_own_tokens(converse: Open) -> None:
    chat = converse("a")
    costs = []
    for question in QUESTIONS:
        said(chat.answer(question))
        reply = chat.replies["a"]
        costs.append(reply.read)
        assert reply.tokens == len(chat.tokenizer(reply.text)["input_ids"])
    frame = len(byte_tokenizer()("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    for question, cost in zip(QUESTIONS, costs, strict=True):
        # One token more ends the answer before and, where it was cut, one more of it is read late.
        assert cost <= len(question) + frame + 3
    assert len(chat._prompt()) > 2 * max(costs)


def test_each_adapter_is_itself(converse: Open, adapters: dict[str, Path], model_folder: str) -> None:
    """Beside others on one base an adapter answers as it does alone."""
    chat = converse("a", "lora", "b.c")
    together = {}
    for name in chat.speakers:
        chat.use(name)
        chat.reset()
        together |= said(chat.answer("sky?"))
    assert together[BASE] == "blue"
    assert len(set(together.values())) == 4
    for name, folder in adapters.items():
        base, tokenizer = load(model_folder, quant_type="none", compute_dtype="float32")
        alone = load_adapter(base, folder).eval()
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "sky?"}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        (answer,) = generate(alone, [prompt], stop_ids(alone, tokenizer), 12)
        assert together[name] == decode(tokenizer, answer.ids)


def test_switching_loads_nothing_and_changes_no_base(converse: Open) -> None:
    chat = converse("a", "b.c", quant_type="nf4")
    with chat.adapters.using(BASE) as model:
        parameters = {id(p): p.clone() for p in transformers_model(model).parameters()}
    for name in ("a", BASE, "b.c", "a"):
        chat.use(name)
        said(chat.answer("sky?"))
    with chat.adapters.using("a") as model:
        after = {id(p): p for p in transformers_model(model).parameters()}
    assert after.keys() == parameters.keys()
    assert all((after[key] == value).all() for key, value in parameters.items())
    assert not any(p.requires_grad for p in after.values())


def test_compare(converse: Open) -> None:
    chat = converse("a", "lora")
    chat.compare = True
    texts = said(chat.answer("sky?"))
    assert list(texts) == list(chat.replies) == [BASE, "a", "lora"]
    assert texts[BASE] == "blue"
    assert chat.turns[-1] == {"role": "assistant", "content": texts["a"]}
    chat.use(BASE)
    second = said(chat.answer("grass?"))
    assert chat.turns[-1]["content"] == second[BASE]
    # All saw the answer of `a` to the first question.
    chat.turns.pop()
    assert second["lora"] == read_again(chat, "lora")


def test_history_and_system(converse: Open) -> None:
    chat = converse(system="Be brief.")
    said(chat.answer("sky?"))
    said(chat.answer("grass?"))
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert chat.tokenizer.decode(chat._prompt()).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nsky?<|im_end|>"
    )
    chat.undo()
    assert [turn["content"] for turn in chat.turns][:1] == ["sky?"]
    chat.undo()
    with pytest.raises(ConfigError, match="nothing to undo"):
        chat.undo()
    with pytest.raises(ConfigError, match="no question to answer again"):
        chat.retry().__next__()


def test_retry_draws_anew_and_a_seed_repeats(converse: Open) -> None:
    def tries(seed: int) -> list[str]:
        chat = converse("a", sampling=Sampling(temperature=2.0, seed=seed))
        first = said(chat.answer("sky?"))["a"]
        again = said(chat.retry())["a"]
        assert chat.turns == [
            {"role": "user", "content": "sky?"},
            {"role": "assistant", "content": again},
        ]
        return [first, again]

    one = tries(1)
    assert one[0] != one[1]
    assert one == tries(1)
    assert one[0] != tries(2)[0]


def test_an_interrupted_answer_stays_and_an_unheard_question_goes(converse: Open) -> None:
    chat = converse()
    answers = chat.answer("grass?")
    assert [next(answers) for _ in range(3)] == [(BASE, ""), (BASE, "g"), (BASE, "r")]
    answers.close()
    assert chat.turns[-1] == {"role": "assistant", "content": "gr"}
    answers = chat.answer("sky?")
    next(answers)
    answers.close()
    assert len(chat.turns) == 2
    assert chat.replies == {}
    said(chat.answer("sky?"))
    chat.turns, turns = chat.turns[:-1], chat.turns
    assert read_again(chat, BASE) == turns[-1]["content"]


def test_a_conversation_that_is_too_long(converse: Open) -> None:
    chat = converse("a")
    with pytest.raises(DataError, match=r"has 5\d\d tokens and the model reads 512"):
        said(chat.answer("x" * 500))
    assert chat.turns == []
    room = 512 - len("<|im_start|>user\n") - 20
    said(chat.answer("x" * room))
    assert len(chat._prompt()) <= 512 + 20
    assert chat.replies["a"].tokens <= 12


def test_settings(converse: Open) -> None:
    chat = converse("a")
    chat.set("temperature", "0.7")
    chat.set("top_k", "5")
    chat.set("max_new_tokens", "3")
    assert (chat.sampling.temperature, chat.sampling.top_k, chat.max_new_tokens) == (0.7, 5, 3)
    assert list(chat.settings) == [
        "temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty", "max_new_tokens",
    ]  # fmt: skip
    for name, value, message in (
        ("temprature", "1", r"no setting 'temprature' \(did you mean 'temperature'\?\)"),
        ("temperature", "hot", "temperature = hot: give a number"),
        ("top_k", "1.5", "top_k = 1.5: give a whole number"),
        ("temperature", "-1", "temperature is -1.0"),
        ("max_new_tokens", "0", "max_new_tokens is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            chat.set(name, value)
    with pytest.raises(ConfigError, match=r"no adapter 'lora'.*there are base, a"):
        chat.use("lora")


def test_files(converse: Open, tmp_path: Path) -> None:
    chat = converse(system="Be brief.")
    said(chat.answer("sky? é"))
    chat.save(tmp_path / "chat.jsonl")
    other = converse()
    other.load(tmp_path / "chat.jsonl")
    assert (other.system, other.turns) == (chat.system, chat.turns)
    (row,) = read_rows([tmp_path / "chat.jsonl"], DataSettings(train=("x",)))
    assert form_of(row, DataSettings(train=("x",))) == "messages"
    other.save(tmp_path / "chat.jsonl")
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        other.save(tmp_path / "mine.jsonl")
    with pytest.raises(ConfigError, match="cannot be written"):
        chat.save(tmp_path / "no" / "chat.jsonl")
    for content, message in (
        ("{", "no conversation"),
        ("[]", "no conversation"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}]}), "must speak in turn"),
        (json.dumps({"messages": [{"role": "system", "content": 3}]}), "must speak in turn"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=message):
            other.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match="cannot be read"):
        other.load(tmp_path / "none.json")
    assert other.turns == chat.turns


def test_a_model_without_a_chat_template_goes_on_from_the_line(learned: LlamaForCausalLM) -> None:
    tokenizer = byte_tokenizer(chat=False)
    chat = Conversation(AdapterSet(learned), tokenizer, max_new_tokens=4)
    said(chat.answer("sky?"))
    assert chat._prompt() == tokenizer(chat.turns[-1]["content"])["input_ids"]


def test_names_that_cannot_be(model_folder: str, adapters: dict[str, Path]) -> None:
    several = AdapterSet(fourbit.load(model_folder)[0])
    several.add("a", adapters["a"])
    for name, message in (("a", "is given twice"), (BASE, "is the base's"), ("", "is empty")):
        with pytest.raises(ConfigError, match=message):
            several.add(name, adapters["a"])
