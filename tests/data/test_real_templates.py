"""Masks under the templates of real models, token by token, against a second implementation.

The reference renders with its own Jinja environment and finds answers from prefixes and from what is known of
each model: the text that ends its turns, and how it treats earlier turns. It sees no offsets: which bytes a
token holds is counted from the tokens' spelling.
"""
# ruff: noqa: E501 - templates stand on one line, as they are printed

from __future__ import annotations

import copy
import datetime
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken

from fourbit.data.batch import NO_LOSS, collate
from fourbit.data.encode import encode, prompt_only
from fourbit.data.render import Renderer
from fourbit.errors import DataError
from tests.tiny import byte_tokenizer

BYTES = byte_tokenizer()
FOLDER = Path(__file__).parent / "templates"

# How a template writes conversations of several turns:
ONE = "one text, earlier answers as they were trained"
EACH = "an earlier turn changes once the conversation goes on, so each answer has its own text"
INSIDE = "the same, and the generation prompt opens a thinking block that written turns do not have"
NO_END = "turns have no end, so eos is added, and each answer has its own text"

#: file: what ends a turn, how turns are written, eos, other special tokens
MODELS: dict[str, tuple[str, str, str, str]] = {
    "chatml_openhermes25": ("<|im_end|>", ONE, "<|im_end|>", ""),
    "deepseek_coder": ("\n<|EOT|>", ONE, "<|EOT|>", ""),
    "deepseek_r1_distill": ("<｜end▁of▁sentence｜>", INSIDE, "<｜end▁of▁sentence｜>", ""),
    "deepseek_v2": ("<｜end▁of▁sentence｜>", ONE, "<｜end▁of▁sentence｜>", ""),
    "deepseek_v3": ("<｜end▁of▁sentence｜>", INSIDE, "<｜end▁of▁sentence｜>", ""),
    "gemma2": ("<end_of_turn>", ONE, "<eos>", "<end_of_turn> <start_of_turn>"),
    "gemma3": ("<end_of_turn>", ONE, "<eos>", "<end_of_turn> <start_of_turn>"),
    "gemma4": ("<turn|>", ONE, "<eos>", "<turn|> <|turn> <|tool_response> <tool_response|> <tool_call|>"),
    "glm45": ("", NO_END, "<|endoftext|>", ""),
    "glm4_0414": ("", NO_END, "<|endoftext|>", ""),
    "gpt_oss": ("<|return|>", EACH, "<|return|>", ""),
    "internlm3": ("<|im_end|>", ONE, "</s>", ""),
    "lfm2": ("<|im_end|>", ONE, "<|im_end|>", ""),
    "llama2": (" </s>", ONE, "</s>", ""),
    "llama3": ("<|eot_id|>", ONE, "<|end_of_text|>", ""),
    "llama31": ("<|eot_id|>", ONE, "<|end_of_text|>", ""),
    "llama32": ("<|eot_id|>", ONE, "<|end_of_text|>", ""),
    "minimax_m2": ("[e~[", INSIDE, "[e~[", "]~b] ]~!b["),
    "mistral_7b_v02": ("</s>", ONE, "</s>", "<s>"),
    "mistral_7b_v03": ("</s>", ONE, "</s>", "<s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS]"),
    "mistral_nemo": ("</s>", ONE, "</s>", "<s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS]"),
    "mixtral_8x22b": ("</s>", ONE, "</s>", "<s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS]"),
    "nemotron3_nano": ("<|im_end|>", INSIDE, "<|im_end|>", ""),
    "orion": ("</s>", ONE, "</s>", "<s>"),
    "phi3": ("<|end|>", ONE, "<|endoftext|>", ""),
    "phi35": ("<|end|>", ONE, "<|endoftext|>", ""),
    "qwen25": ("<|im_end|>", ONE, "<|im_end|>", ""),
    "qwen3": ("<|im_end|>", EACH, "<|im_end|>", ""),
    "qwen35_think": ("<|im_end|>", EACH, "<|im_end|>", ""),
    "qwen3_instruct_2507": ("<|im_end|>", ONE, "<|im_end|>", ""),
    "qwen3_thinking_2507": ("<|im_end|>", EACH, "<|im_end|>", ""),
    "qwq_32b": ("<|im_end|>", INSIDE, "<|im_end|>", ""),
    "seed_oss": ("<seed:eos>", ONE, "<seed:eos>", "<seed:bos>"),
    "yi15": ("<|im_end|>", ONE, "<|im_end|>", ""),
    "zephyr": ("</s>", ONE, "</s>", ""),
}
#: These put the system message into the last user turn, so it moves: each answer has its own text.
SYSTEM_MOVES = {"mistral_7b_v03", "mistral_nemo", "mixtral_8x22b"}
#: These know no system message: the first refuses it, the second would leave it out unsaid.
NO_SYSTEM = {"gemma2": "System role not supported", "orion": "does not write this system message"}
#: These write tool calls, and end the turn that calls with this.
CALLS = {
    "gemma4": "<|tool_response>", "gpt_oss": "<|call|>", "glm45": "", "llama31": "<|eot_id|>",
    "llama32": "<|eot_id|>", "minimax_m2": "[e~[", "mistral_7b_v03": "</s>", "mistral_nemo": "</s>",
    "mixtral_8x22b": "</s>", "nemotron3_nano": "<|im_end|>", "qwen25": "<|im_end|>", "qwen3": "<|im_end|>", "qwen35_think": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>", "qwen3_thinking_2507": "<|im_end|>", "qwq_32b": "<|im_end|>",
    "seed_oss": "<seed:eos>",
}  # fmt: skip

TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "été ☃ yes"},
    {"role": "user", "content": "world: no"},
    {"role": "assistant", "content": "ok"},
]
SYSTEM = [{"role": "system", "content": "Be kind."}]
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "get_weather", "arguments": {"city": "Bonn"}},
}
CALLING = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "sun"},
    {"role": "assistant", "content": "sunny"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where"}},
                "required": ["city"],
            },
        },
    }
]


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def jinja(name: str, messages: list[Any], prompt: bool, tools: Any = None) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None: json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    template = environment.from_string((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
    return template.render(
        messages=messages,
        tools=tools,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token=MODELS[name][2],
    )


def reference(name: str, messages: list[Any], tools: Any = None, each: bool = False) -> list[str]:
    """The texts of a conversation, with « and » around what is trained."""
    end, how, eos, _ = MODELS[name]
    whole = jinja(name, messages, False, tools)
    texts, marks = [], []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = jinja(name, messages[:index], True, tools)
        upto = jinja(name, messages[: index + 1], False, tools)
        said = message["content"]
        stop = CALLS[name] if message.get("tool_calls") else end
        if how == INSIDE:
            tag = before.rindex("<think>")
            assert before[tag:].rstrip() == "<think>"
            written = said or upto[max(upto.rfind("<tool_call>"), upto.rfind("<minimax:tool_call>")) :]
            answer = "\n</think>\n\n" + (said + stop if said else written[: written.rindex(stop) + len(stop)])
            texts.append(f"{before}«{answer}»{upto[upto.rindex(stop) + len(stop) :]}")
            continue
        if each and not upto.startswith(before):  # the system message moved: the answer is what follows it
            answer = upto[upto.rindex("[/INST]") + len("[/INST]") :]
            texts.append(f"{before}«{answer}»")
            continue
        assert upto.startswith(before)
        place = upto.rindex(said or "get_weather", len(before))
        if how == NO_END:
            texts.append(f"{before}«{upto[len(before) :].rstrip()}{eos}»")
            continue
        close = upto.index(stop, place + len(said)) + len(stop)
        texts.append(f"{before}«{upto[len(before) : close]}»{upto[close:]}")
        marks.append((len(before), close))
    if how != ONE or each:
        return texts
    for start, close in reversed(marks):
        whole = f"{whole[:start]}«{whole[start:close]}»{whole[close:]}"
    return [whole]


@cache
def tokenizer_for(name: str, base: Any) -> Any:
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    _, _, eos, more = MODELS[name]
    special = {"<s>", eos, *more.split(), *re.findall(r"<\|[^<>|\s]+\|>|<｜[^<>\s]+｜>", template)}
    tokenizer = copy.deepcopy(base)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(special)])
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<s>", eos, eos
    tokenizer.chat_template = template
    return tokenizer


def examples_of(tokenizer: Any, settings: Any, row: Any) -> list[Any]:
    renderer = Renderer(tokenizer, settings)
    texts = renderer.texts(row)
    encoded = renderer.tokenize([text.text for text in texts])
    return [e for text, tokens in zip(texts, encoded, strict=True) for e in renderer.examples(text, tokens)]


def spelled(tokenizer: Any, ids: list[int], trained: list[bool]) -> list[str]:
    return [
        f"*{token}" if on else token
        for token, on in zip(tokenizer.convert_ids_to_tokens(ids), trained, strict=True)
    ]


def check(tokenizer: Any, examples: list[Any], marked: list[str], expected: Any) -> None:
    assert len(examples) == len(marked)
    for example, text in zip(examples, marked, strict=True):
        ids, trained = expected(tokenizer, text)
        assert spelled(tokenizer, example.input_ids, example.trained) == spelled(tokenizer, ids, trained)


@pytest.fixture(scope="module", params=["bytes", "SmolLM2"])
def base(request: pytest.FixtureRequest, smollm2: Any) -> Any:
    return BYTES if request.param == "bytes" else smollm2


def test_every_template_is_tested():
    assert {file.stem for file in FOLDER.glob("*.jinja")} == set(MODELS)
    assert len(MODELS) >= 15
    listed = (FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in listed for name in MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_two_turns(name, base, settings, row, expected):
    tokenizer = tokenizer_for(name, base)
    examples = examples_of(tokenizer, settings(), row(messages=TURNS))
    check(tokenizer, examples, reference(name, TURNS), expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NO_SYSTEM])
def test_a_system_message(name, base, settings, row, expected):
    tokenizer = tokenizer_for(name, base)
    examples = examples_of(tokenizer, settings(), row(messages=SYSTEM + TURNS))
    check(tokenizer, examples, reference(name, SYSTEM + TURNS, each=name in SYSTEM_MOVES), expected)


@pytest.mark.parametrize(("name", "reason"), NO_SYSTEM.items())
def test_a_system_message_that_the_template_cannot_write_is_refused(name, reason, settings, row):
    tokenizer = tokenizer_for(name, BYTES)
    with pytest.raises(DataError, match=reason):
        examples_of(tokenizer, settings(), row(messages=SYSTEM + TURNS))


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_are_trained_and_tool_results_are_not(name, base, settings, row, expected):
    tokenizer = tokenizer_for(name, base)
    examples = examples_of(tokenizer, settings(), row(messages=CALLING, tools=TOOLS))
    # Where turns after the last user message keep their thinking, calls and answers are one text.
    nests = name in ("gpt_oss", "qwen35_think")
    texts = reference(name, CALLING, TOOLS)
    if nests:
        assert len(examples) == 1
        assert sum(examples[0].trained) == sum(sum(expected(tokenizer, text)[1]) for text in texts)
        ids, trained = expected(tokenizer, texts[-1])
        assert examples[0].input_ids == ids
        assert all(examples[0].trained[i] for i, on in enumerate(trained) if on)
        return
    check(tokenizer, examples, texts, expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CALLS])
def test_tools_that_the_template_does_not_write_are_refused(name, settings, row):
    tokenizer = tokenizer_for(name, BYTES)
    with pytest.raises(DataError, match=r"chat template (refuses|does not write)"):
        examples_of(tokenizer, settings(), row(messages=CALLING, tools=TOOLS))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_turn_alone(name, base, settings, row, expected):
    tokenizer = tokenizer_for(name, base)
    examples = examples_of(tokenizer, settings(loss="last"), row(messages=TURNS))
    last = reference(name, TURNS)[-1]
    if MODELS[name][1] == ONE:
        head, _, tail = last.rpartition("«")
        last = head.replace("«", "").replace("»", "") + "«" + tail
    check(tokenizer, examples, [last], expected)


@pytest.mark.parametrize("name", MODELS)
def test_everything(name, base, settings, row):
    tokenizer = tokenizer_for(name, base)
    (example,) = examples_of(tokenizer, settings(loss="all"), row(messages=TURNS))
    assert example.input_ids == tokenizer(jinja(name, TURNS, False), add_special_tokens=False)["input_ids"]
    assert example.trained == [False] + [True] * (len(example.input_ids) - 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_end_of_turn_is_trained_though_it_is_the_pad_token(name, base, settings, row):
    tokenizer = tokenizer_for(name, base)
    end, _, eos, _ = MODELS[name]
    last = (end or eos).rstrip()
    stop = tokenizer.convert_tokens_to_ids(re.split(r"(?<=>)(?=<)", last.strip())[-1])
    encoded = encode([row(messages=TURNS)], tokenizer, settings(max_length=4096))
    batch = collate(encoded.examples, tokenizer.pad_token_id)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert (batch.labels == stop).sum().item() == 2
    assert (batch.labels[batch.attention_mask == 0] == NO_LOSS).all()


@pytest.mark.parametrize("name", MODELS)
def test_every_text_begins_as_the_model_sees_it_at_inference(name, settings, row):
    tokenizer = tokenizer_for(name, BYTES)
    item = row(messages=TURNS)
    example = examples_of(tokenizer, settings(loss="last"), item)[-1]
    prompt, answer = prompt_only(item, tokenizer, settings())
    assert answer == "ok"
    assert example.input_ids[: len(prompt)] == prompt
    assert example.prompt_tokens == len(prompt)


THOUGHTS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "<think>\nhm one\n</think>\n\nyes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "<think>\nhm two\n</think>\n\nok"},
]
SEPARATE = [
    {**turn, "content": turn["content"].split("\n\n")[-1], "reasoning_content": thought}
    if (thought := {1: "hm one", 3: "hm two"}.get(index))
    else turn
    for index, turn in enumerate(THOUGHTS)
]
THINKING = {
    "qwen3": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
    "<|im_start|>assistant\n«<think>\nhm two\n</think>\n\nok<|im_end|>»\n",
    "qwen3_thinking_2507": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\nmore"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n«hm two\n</think>\n\nok<|im_end|>»\n",
    "qwq_32b": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n«hm two\n</think>\n\nok<|im_end|>»\n",
    "deepseek_r1_distill": "<s><｜User｜>hello<｜Assistant｜>{}<｜end▁of▁sentence｜><｜User｜>more<｜Assistant｜><think>\n"
    "«hm two\n</think>\n\nok<｜end▁of▁sentence｜>»",
}  # fmt: skip


@pytest.mark.parametrize("form", ["in the content", "in a key of its own"])
@pytest.mark.parametrize("name", THINKING)
def test_a_turns_own_thinking_is_trained_and_earlier_thinking_is_gone(
    name, form, base, settings, row, expected
):
    tokenizer = tokenizer_for(name, base)
    messages = THOUGHTS if form == "in the content" else SEPARATE
    examples = examples_of(tokenizer, settings(), row(messages=messages))
    assert len(examples) == 2
    earlier = "\n\nyes" if name == "deepseek_r1_distill" and messages is THOUGHTS else "yes"
    check(tokenizer, examples[1:], [THINKING[name].format(earlier)], expected)
    assert "hm one" in tokenizer.decode(
        [i for i, on in zip(examples[0].input_ids, examples[0].trained, strict=True) if on]
    )


def test_thinking_that_the_template_leaves_out_is_refused(settings, row):
    tokenizer = tokenizer_for("llama31", BYTES)
    with pytest.raises(DataError, match="message 2: the chat template does not write 'hm one' of this turn"):
        examples_of(tokenizer, settings(), row(messages=SEPARATE))


def test_a_call_that_the_template_leaves_out_is_refused(settings, row):
    tokenizer = tokenizer_for("lfm2", BYTES)
    with pytest.raises(DataError, match="message 2: the chat template does not write 'get_weather'"):
        examples_of(tokenizer, settings(), row(messages=CALLING))
