"""Masks of conversations, token by token, under the templates of real models."""
# ruff: noqa: E501 - messages and templates stand on one line, as they are printed

from __future__ import annotations

import pytest

from fourbit.data.batch import NO_LOSS, collate
from fourbit.data.encode import encode, prompt_only
from fourbit.data.render import render
from fourbit.errors import DataError

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI3 = (  # the end of the text comes after the last turn alone
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (  # ends turns with ordinary text, and prompts with a space that trimmed offsets give no width
    "{% for m in messages %}{{ m.role + ' -> ' + m.content + ' ###\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant -> ' }}{% endif %}"
)
THINKING = (  # writes a thinking block into the last turn and drops it from earlier ones
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {
    "SmolLM2": (SMOLLM2, {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"}),
    "ChatML": (CHATML, {"bos": None, "eos": "<|im_end|>", "pad": "<|endoftext|>"}),
    "Llama 3": (LLAMA3, {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "adds_bos": True}),
    "Zephyr": (ZEPHYR, {"pad": "</s>", "adds_bos": True}),
    "Gemma": (GEMMA, {"bos": "<bos>", "eos": "<eos>", "adds_bos": True}),
    "Mistral": (MISTRAL, {"adds_bos": True}),
    "Phi 3": (PHI3, {"eos": "<|endoftext|>", "pad": "<|endoftext|>"}),
    "plain text ends": (PLAIN, {}),
    "thinking": (THINKING, {"eos": "<|im_end|>"}),
}

TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "world: no"},
    {"role": "assistant", "content": "été ☃ yes"},
]

ONE_TURN = {
    "SmolLM2": "<|im_start|>system\nYou are SmolLM<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    "<|im_start|>assistant\n«ok<|im_end|>»\n",
    "ChatML": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n«ok<|im_end|>»\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«ok<|eot_id|>»",
    "Zephyr": "<|user|>\nhello</s>\n<|assistant|>\n«ok</s>»\n",
    "Gemma": "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n«ok<end_of_turn>»\n",
    "Mistral": "<s>[INST] hello [/INST]« ok</s>»",
    "Phi 3": "<|user|>\nhello<|end|>\n<|assistant|>\n«ok<|end|>»\n<|endoftext|>",
    "plain text ends": "user -> hello ###\nassistant -> «ok ###»\n",
    "thinking": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nok<|im_end|>»\n",
}

TWO_TURNS = {
    "SmolLM2": ONE_TURN["SmolLM2"] + "<|im_start|>user\nworld: no<|im_end|>\n<|im_start|>assistant\n«été ☃ yes<|im_end|>»\n",
    "ChatML": ONE_TURN["ChatML"] + "<|im_start|>user\nworld: no<|im_end|>\n<|im_start|>assistant\n«été ☃ yes<|im_end|>»\n",
    "Llama 3": ONE_TURN["Llama 3"] + "<|start_header_id|>user<|end_header_id|>\n\nworld: no<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«été ☃ yes<|eot_id|>»",
    "Zephyr": ONE_TURN["Zephyr"] + "<|user|>\nworld: no</s>\n<|assistant|>\n«été ☃ yes</s>»\n",
    "Gemma": ONE_TURN["Gemma"] + "<start_of_turn>user\nworld: no<end_of_turn>\n<start_of_turn>model\n«été ☃ yes<end_of_turn>»\n",
    "Mistral": ONE_TURN["Mistral"] + "[INST] world: no [/INST]« été ☃ yes</s>»",
    "Phi 3": "<|user|>\nhello<|end|>\n<|assistant|>\n«ok<|end|>»\n<|user|>\nworld: no<|end|>\n"
    "<|assistant|>\n«été ☃ yes<|end|>»\n<|endoftext|>",
    "plain text ends": ONE_TURN["plain text ends"] + "user -> world: no ###\nassistant -> «été ☃ yes ###»\n",
}  # fmt: skip

#: What a template writes after the end of the last turn; the model never writes it.
UNTRAINED_END = {"Llama 3": "", "Mistral": "", "Phi 3": "\n<|endoftext|>"}

CASES = [(name, 2, marked) for name, marked in ONE_TURN.items()] + [
    (name, 4, m) for name, m in TWO_TURNS.items()
]


@pytest.mark.parametrize("trims", [False, True], ids=["offsets", "trimmed offsets"])
@pytest.mark.parametrize(
    ("name", "count", "marked"), CASES, ids=[f"{name}-{count // 2}" for name, count, _ in CASES]
)
def test_answers_and_their_ends_are_trained_and_nothing_else(
    name, count, marked, trims, make_tokenizer, settings, row, expected
):
    template, options = TEMPLATES[name]
    tokenizer = make_tokenizer(template, trims_offsets=trims, **options)
    example = render(row(messages=TURNS[:count]), tokenizer, settings())
    ids, trained = expected(tokenizer, marked)
    assert example.input_ids == ids
    assert list(zip(tokenizer.convert_ids_to_tokens(ids), example.trained, strict=True)) == list(
        zip(tokenizer.convert_ids_to_tokens(ids), trained, strict=True)
    )
    assert example.prompt_tokens == trained.index(True)
    assert example.source == "f.jsonl:1"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_what_rendering_each_prefix_finds(name, make_tokenizer, settings, row):
    """Where no token straddles prompt and answer, ids(prefix) are a prefix of the ids and bound the answer."""
    template, options = TEMPLATES[name]
    tokenizer = make_tokenizer(template, **options)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]
    example = render(row(messages=turns), tokenizer, settings())
    before = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    upto = tokenizer.apply_chat_template(turns, return_dict=False)
    assert example.input_ids == upto
    assert example.input_ids[: len(before)] == before
    first, last = example.trained.index(True), len(upto) - example.trained[::-1].index(True)
    assert first == len(before) == example.prompt_tokens
    assert all(example.trained[first:last])
    assert tokenizer.decode(upto[last:]) == UNTRAINED_END.get(name, "\n")


def test_the_prompt_at_inference_is_the_prompt_in_training(make_tokenizer, settings, row):
    for template, options in TEMPLATES.values():
        tokenizer = make_tokenizer(template, **options)
        item = row(prompt="hello", completion="fine")
        example = render(item, tokenizer, settings())
        ids, reference = prompt_only(item, tokenizer, settings())
        assert ids == example.input_ids[: example.prompt_tokens]
        assert reference == "fine"


def test_a_token_of_prompt_and_answer_is_trained(make_tokenizer, settings, row, expected):
    """ChatML's prompt ends with a newline; this tokenizer's token of newline and "ok" holds the answer's "ok"."""
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    example = render(row(messages=TURNS[:2]), tokenizer, settings())
    at = example.trained.index(True)
    assert tokenizer.convert_ids_to_tokens(example.input_ids[at - 1 : at + 2]) == [
        "assistant",
        "Ċok",
        "<|im_end|>",
    ]
    assert example.trained[at - 1 :] == [False, True, True, False]


def test_a_character_of_several_tokens_is_trained_whole(make_tokenizer, settings, row):
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    example = render(row(prompt="☃", completion="☃"), tokenizer, settings())
    snow = tokenizer("☃", add_special_tokens=False)["input_ids"]
    assert len(snow) == 3
    assert example.input_ids[-5:-2] == snow
    assert example.trained[-5:] == [True, True, True, True, False]
    assert sum(example.trained) == 4


def test_the_end_of_turn_is_trained_where_it_is_the_pad_token(make_tokenizer, settings, row):
    tokenizer = make_tokenizer(SMOLLM2, bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>")
    rows = [row(1, messages=TURNS[:2]), row(2, messages=TURNS)]
    examples = encode(rows, tokenizer, settings()).examples
    batch = collate(examples, tokenizer.pad_token_id)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    assert [(labels == end).sum().item() for labels in batch.labels] == [1, 2]
    assert (batch.labels[batch.attention_mask == 0] == NO_LOSS).all()


def test_special_tokens_inside_an_answer_do_not_end_it(make_tokenizer, settings, row, expected):
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    example = render(row(prompt="hello", completion="a<|im_end|>\nb\n"), tokenizer, settings())
    marked = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>\nb\n<|im_end|>»\n"
    assert (example.input_ids, example.trained) == expected(tokenizer, marked)


def test_loss_on_everything(make_tokenizer, settings, row):
    tokenizer = make_tokenizer(THINKING, eos="<|im_end|>")
    example = render(row(messages=TURNS), tokenizer, settings(loss="all"))
    assert example.trained == [False] + [True] * (len(example.input_ids) - 1)
    assert example.prompt_tokens == 1


def test_the_system_message_of_the_settings_comes_first_unless_the_row_has_one(make_tokenizer, settings, row):
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    own = [{"role": "system", "content": "own"}, *TURNS[:2]]
    texts = [
        tokenizer.decode(render(row(messages=messages), tokenizer, settings(system="ours")).input_ids)
        for messages in (TURNS[:2], own)
    ]
    assert texts[0].startswith("<|im_start|>system\nours<|im_end|>\n<|im_start|>user\nhello")
    assert texts[1].startswith("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nhello")
    ids, _ = prompt_only(row(prompt="hello", completion="ok"), tokenizer, settings(system="ours"))
    assert (
        tokenizer.decode(ids)
        == "<|im_start|>system\nours<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_earlier_answer_without_its_thinking_gets_a_text_of_its_own(
    make_tokenizer, settings, row, expected
):
    tokenizer = make_tokenizer(THINKING, eos="<|im_end|>")
    examples = encode([row(messages=TURNS)], tokenizer, settings()).examples
    second = (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\nworld: no<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nété ☃ yes<|im_end|>»\n"
    )
    assert [(example.row, example.source) for example in examples] == [(0, "f.jsonl:1"), (1, "f.jsonl:1")]
    assert [(example.input_ids, example.trained) for example in examples] == [
        expected(tokenizer, ONE_TURN["thinking"]),
        expected(tokenizer, second),
    ]


def test_a_thinking_block_that_the_generation_prompt_opens_is_closed(make_tokenizer, settings, row, expected):
    tokenizer = make_tokenizer(OTHER_PROMPT, eos="<|im_end|>")
    example = render(row(messages=TURNS[:2]), tokenizer, settings())
    marked = (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n«\n</think>\n\nok<|im_end|>»\n"
    )
    assert (example.input_ids, example.trained) == expected(tokenizer, marked)


def test_an_answer_follows_the_generation_prompt_whatever_the_template_writes_there_later(
    make_tokenizer, settings, row, expected
):
    tokenizer = make_tokenizer(OTHER_PROMPT.replace("<think>", "Sure:"), eos="<|im_end|>")
    example = render(row(messages=TURNS[:2]), tokenizer, settings())
    marked = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nSure:\n«ok<|im_end|>»\n"
    assert (example.input_ids, example.trained) == expected(tokenizer, marked)


def test_a_turn_may_end_with_another_special_token(make_tokenizer, settings, row, expected):
    tokenizer = make_tokenizer(OTHER_END, eos="<|im_end|>")
    example = render(row(messages=[TURNS[0], {**TURNS[1], "tool": "x"}]), tokenizer, settings())
    marked = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n«ok<|endoftext|>»"
    assert (example.input_ids, example.trained) == expected(tokenizer, marked)


def test_eos_ends_the_turns_of_a_template_that_ends_none(make_tokenizer, settings, row, expected):
    tokenizer = make_tokenizer(NO_END)
    examples = encode([row(messages=TURNS)], tokenizer, settings()).examples
    assert [(example.input_ids, example.trained) for example in examples] == [
        expected(tokenizer, "user: hello\nassistant: «ok</s>»"),
        expected(tokenizer, "user: hello\nassistant: ok\nuser: world: no\nassistant: «été ☃ yes</s>»"),
    ]


def test_two_renderings_for_a_row_of_two_turns(make_tokenizer, settings, row, monkeypatch):
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    calls, original = [], tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    encode([row(line, prompt="hello", completion="ok") for line in range(1, 11)], tokenizer, settings())
    assert len(calls) == 2 * 10 + 2  # and two to learn how the template writes a turn


NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
SILENT = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
OTHER_PROMPT = CHATML.replace(
    "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif"
)
OTHER_END = CHATML.replace("'<|im_end|>\n' }}", "('<|endoftext|>' if m.tool else '<|im_end|>\n') }}")

REFUSED = {
    "generation prompt is another": (
        "{{ messages[-1].content | length }}" + CHATML,
        TURNS[:2],
        "f.jsonl:7: message 2: the chat template begins this turn otherwise than its own generation prompt, so training "
        "would differ from inference; repair the template",
    ),
    "a turn ends otherwise": (
        OTHER_END.replace("<|endoftext|>", " done"),
        [TURNS[0], {**TURNS[1], "tool": "x"}],
        "f.jsonl:7: message 2: the chat template does not end this turn with '<|im_end|>\\n' as it ends others, so its "
        "end token cannot be found; change the message or the template",
    ),
    "system message left out": (
        CHATML.replace("in messages", "in messages if m.role != 'system'"),
        [{"role": "system", "content": "x y z"}, *TURNS[:2]],
        "f.jsonl:7: message 1: the chat template does not write this system message, so the model would not see it; "
        "remove it or move it into a user turn",
    ),
    "answers not written": (
        SILENT,
        TURNS[:2],
        "f.jsonl:7: the chat template does not write what the assistant says; repair the template",
    ),
    "assistant first": (
        CHATML,
        TURNS[1:],
        "f.jsonl:7: the conversation begins with the assistant, so there is nothing it answers; begin with a user turn",
    ),
    "the template's own refusal": (
        GEMMA,
        [{"role": "system", "content": "x"}, *TURNS[:2]],
        "f.jsonl:7: the chat template refuses the conversation (System role not supported); change the row",
    ),
    "a broken template": (
        CHATML.replace("m.content", "m.content + 1"),
        TURNS[:2],
        'f.jsonl:7: the chat template refuses the conversation (can only concatenate str (not "int") to str); change the row',
    ),
    "half of a surrogate pair": (
        CHATML,
        [TURNS[0], {"role": "assistant", "content": "a\ud83d"}],
        "f.jsonl:7: holds half of a character pair ('\\ud83d'); repair the row",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_conversations_that_cannot_be_masked_are_refused(case, make_tokenizer, settings, row):
    template, messages, message = REFUSED[case]
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    with pytest.raises(DataError) as error:
        render(row(7, messages=messages), tokenizer, settings())
    assert str(error.value) == message
