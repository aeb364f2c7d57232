"""The account before training: what is refused, what is dropped by name, what is only reported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fourbit.config import DataSettings
from fourbit.data.encode import encode, split_rows
from fourbit.data.fingerprint import fingerprint
from fourbit.data.gate import prepare
from fourbit.data.read import read_rows
from fourbit.data.view import cells, page
from fourbit.errors import DataError
from tests.tiny import byte_tokenizer

TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "ok"},
]
PROBLEMS = {
    "empty": [
        {},
        {"messages": [TALK[0], {"role": "assistant", "content": " "}]},
        {"prompt": "a", "completion": ""},
        {"text": " "},
    ],
    "no_trained_token": [{"messages": TALK[:1]}],
    "no_end_token": [{"messages": [*TALK, TALK[0]]}],
    "refused": [{"messages": TALK[1:]}, {"messages": "hello"}, {"messages": TALK, "tools": [{"name": "f"}]}],
}


def write(folder: Path, name: str, records: list[object]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "record"), [(kind, record) for kind, records in PROBLEMS.items() for record in records]
)
def test_a_row_that_cannot_be_trained_refuses_the_run_unless_its_kind_is_allowed(kind, record, tmp_path):
    file = write(tmp_path, "a.jsonl", [{"messages": TALK}, record, {"messages": TALK}])
    others = [other for other in PROBLEMS if other != kind]
    for allow in ([], others):
        settings = DataSettings(train=file, heldout_fraction=0, allow=allow)
        with pytest.raises(DataError, match=r"a\.jsonl:2: ") as error:
            prepare(settings, byte_tokenizer(), 0)
        assert "\n" not in str(error.value)
        assert (kind == "empty" and record == {}) or f"`data.allow: [{kind}]` drops such rows" in str(
            error.value
        )
    report = prepare(DataSettings(train=file, heldout_fraction=0, allow=kind), byte_tokenizer(), 0).report
    assert (report.rows, report.train_rows, report.dropped) == (3, 2, {kind: 1})


def test_all_kinds_are_counted_in_one_line(tmp_path):
    records = [record for records in PROBLEMS.values() for record in records if record]
    file = write(tmp_path, "a.jsonl", [{"messages": TALK}, *records])
    with pytest.raises(DataError) as error:
        prepare(DataSettings(train=file), byte_tokenizer(), 0)
    assert re.match(
        r"8 rows cannot be trained \(3 empty, 1 no_trained_token, 1 no_end_token, 3 refused\), one of them: "
        r".*a\.jsonl:\d: .* "
        r"\(`data\.allow: \[empty, no_trained_token, no_end_token, refused\]` drops such rows\)$",
        str(error.value),
    )


def test_rows_of_which_none_is_left(tmp_path):
    file = write(tmp_path, "a.jsonl", [{"messages": TALK[:1]}])
    with pytest.raises(DataError, match=r"none of 1 row can be trained \(1 no_trained_token\); give others"):
        prepare(DataSettings(train=file, allow="no_trained_token"), byte_tokenizer(), 0)


def test_the_report(tmp_path):
    rows = [
        {"prompt": "What is it?", "completion": "red"},
        {"prompt": "What is it?", "completion": "red"},
        {"prompt": "And now", "completion": "x" * 200},
        {"prompt": "", "completion": ""},
        {"prompt": "Else", "completion": "blue"},
    ]
    held = [
        {"prompt": "What is it?", "completion": "red"},
        {"prompt": "what is  it", "completion": "Red!"},
        {"prompt": "new", "completion": "red"},
        {"prompt": "long", "completion": "y" * 200},
    ]
    settings = DataSettings(
        train=write(tmp_path, "a.jsonl", rows),
        heldout=write(tmp_path, "h.jsonl", held),
        allow=["empty"],
        max_length=100,
    )
    prepared = prepare(settings, byte_tokenizer(), 0)
    report = prepared.report
    assert (report.rows, report.train_rows, report.heldout_rows) == (5, 3, 3)
    assert report.dropped == {"longer than 100 tokens": 1, "empty": 1}
    assert report.heldout_dropped == {"longer than 100 tokens": 1}
    assert (report.duplicates, report.leaked, report.leaked_nearly) == (1, 1, 1)
    lengths = [len(example.input_ids) for example in prepared.train]
    assert report.tokens == sum(lengths)
    assert report.trained_tokens == 2 * len("red.") + len("blue.")
    assert report.lengths == {"10 %": min(lengths), "median": max(lengths), "90 %": max(lengths),
                              "99 %": max(lengths), "longest": max(lengths)}  # fmt: skip
    assert json.loads(json.dumps(report.to_dict()))["leaked"] == 1
    lines = {name: (value, attention) for name, value, attention in report.lines()}
    assert lines["duplicates"] == ("1 training row is like another", True)
    assert lines["leakage"] == (
        "1 held-out row is trained on too, 1 more but for case, spaces and punctuation",
        True,
    )
    assert lines["used"] == ("3 to train, 3 held out", False)


def test_percentiles_are_lengths_that_occur(tmp_path):
    file = write(tmp_path, "a.jsonl", [{"text": "x" * n} for n in range(1, 101)])
    report = prepare(DataSettings(train=file, heldout_fraction=0), byte_tokenizer(), 0).report
    assert report.lengths == {"10 %": 11, "median": 51, "90 %": 91, "99 %": 100, "longest": 101}


def test_examples_of_one_row_stay_on_one_side(settings, row):
    rows = [row(line, text="x" * 50) for line in range(1, 41)]
    examples = encode(rows, byte_tokenizer(), settings(max_length=16)).examples
    assert len(examples) > 100
    train, heldout = split_rows(examples, 0.25, seed=0)
    sides = {e.source for e in train}, {e.source for e in heldout}
    assert len(train) + len(heldout) == len(examples)
    assert len(sides[1]) == 10
    assert not sides[0] & sides[1]


def test_fingerprints():
    assert fingerprint("A b") == fingerprint("A b")
    assert fingerprint("A  b!")[0] != fingerprint("a_b")[0]
    assert fingerprint("A  b!")[1] == fingerprint("a_b")[1]
    assert fingerprint("a b")[1] != fingerprint("ab")[1]


LONG = [
    {"role": "system", "content": "sys"},
    *({"role": role, "content": f"{role[0]}{n}" * 6} for n in range(6) for role in ("user", "assistant")),
]


class TestTooLong:
    def test_split_at_turns_trains_every_answer_once(self, settings, row):
        tokenizer = byte_tokenizer()
        whole = encode([row(messages=LONG)], tokenizer, settings()).examples[0]
        encoded = encode([row(messages=LONG)], tokenizer, settings(max_length=150, too_long="split_turns"))
        assert len(encoded.examples) > 1
        assert encoded.cut == {"split at turns": 1}
        assert encoded.dropped == {}
        trained = [
            tokenizer.decode([i for i, on in zip(e.input_ids, e.trained, strict=True) if on])
            for e in [whole, *encoded.examples]
        ]
        assert "".join(trained[1:]) == trained[0]
        for example in encoded.examples:
            assert len(example.input_ids) <= 150
            text = tokenizer.decode(example.input_ids)
            assert text.startswith("<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\n")
            assert text.endswith("<|im_end|>\n")
        assert "cut" not in encoded.summary()
        assert encoded.summary().endswith("dropped: none; 1 split at turns")

    def test_an_exchange_too_long_by_itself_is_dropped_and_counted(self, settings, row):
        turns = [*LONG[:5], {"role": "user", "content": "x" * 300}, *LONG[6:]]
        encoded = encode(
            [row(messages=turns)], byte_tokenizer(), settings(max_length=150, too_long="split_turns")
        )
        text = "".join(byte_tokenizer().decode(example.input_ids) for example in encoded.examples)
        assert encoded.dropped == {"longer than 150 tokens": 1}
        assert "x" * 10 not in text
        assert text.count("assistant") == 5

    def test_a_pair_cannot_be_split(self, settings, row):
        rows = [row(prompt="x" * 300, completion="y"), row(prompt="x", completion="y")]
        encoded = encode(rows, byte_tokenizer(), settings(max_length=100, too_long="split_turns"))
        assert (len(encoded.examples), encoded.dropped) == (1, {"longer than 100 tokens": 1})
        assert encoded.cut == {}

    def test_keeping_the_end_never_halves_an_answer(self, settings, row):
        tokenizer = byte_tokenizer()
        whole = encode([row(messages=LONG)], tokenizer, settings()).examples[0]
        ends = [i for i in range(1, len(whole.trained)) if whole.trained[i] and not whole.trained[i - 1]]
        for length in range(30, len(whole.input_ids)):
            try:
                encoded = encode(
                    [row(messages=LONG)], tokenizer, settings(max_length=length, too_long="keep_end")
                )
            except DataError:
                assert length <= len(whole.input_ids) - ends[-1]
                continue
            assert length > len(whole.input_ids) - ends[-1]
            (example,) = encoded.examples
            assert example.input_ids == whole.input_ids[-length:]
            cut = len(whole.input_ids) - length
            begins = next(start for start in ends if start > cut)
            assert example.trained == [False] * (begins - cut) + whole.trained[begins:]
            assert encoded.cut == {"kept the end": 1}

    def test_keeping_the_end_keeps_bos(self, make_tokenizer, settings, row):
        tokenizer = make_tokenizer(adds_bos=True)
        item = row(prompt="z" * 50, completion="fine")
        (example,) = encode([item], tokenizer, settings(max_length=12, too_long="keep_end")).examples
        assert tokenizer.decode(example.input_ids) == "<s>zzzzzzfine</s>"
        assert example.trained == [False] * 7 + [True] * 5


class TestView:
    def test_cells_spell_the_text_and_carry_the_mask(self, smollm2, settings, row):
        messages = [TALK[0], {"role": "assistant", "content": "Olá 🤗 ok\n  x"}]
        (example,) = encode([row(messages=messages)], smollm2, settings()).examples
        found = cells(example, smollm2)
        assert "".join(cell.text for cell in found) == smollm2.decode(example.input_ids)
        assert [i for cell in found for i in cell.ids] == example.input_ids
        assert [cell.trained for cell in found for _ in cell.ids] == example.trained
        assert [cell.text for cell in found if len(cell.ids) > 1] == [" 🤗"]
        assert {cell.text for cell in found if cell.special} == {"<|im_start|>", "<|im_end|>"}

    def test_the_page_escapes_all_text_and_needs_nothing_from_elsewhere(self, tmp_path):
        evil = '<script>alert("x")</script>&<img src=x onerror=y>'
        messages = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
        name = "a<b>.jsonl"
        settings = DataSettings(train=write(tmp_path, name, [{"messages": messages}]), heldout_fraction=0)
        tokenizer = byte_tokenizer()
        prepared = prepare(settings, tokenizer, 0)
        html = page(prepared.report, [(e, cells(e, tokenizer)) for e in prepared.train], "What is <trained>?")
        assert "<script" not in html
        assert "<img" not in html
        assert "<b>" not in html
        assert "<trained>" not in html
        assert not re.search(r"https?:|src=|href=|url\(|@import", html)
        spans = re.findall(r'<span class="(on|off)[^"]*" title="[^"]*">', html.split("<section>")[1])
        assert [kind == "on" for kind in spans] == prepared.train[0].trained

    def test_banking77(self, smollm2, settings):
        """The shipped data passes the gate, every row used."""
        folder = Path(__file__).parents[2] / "demo" / "banking77"
        wanted = settings(prompt="{text}", completion="{category}")
        rows = read_rows([folder / "test.csv"], wanted)
        encoded = encode(rows[::10], smollm2, wanted)
        assert encoded.dropped == {}
        assert len(encoded.used) == len(encoded.examples) == len(rows[::10])
