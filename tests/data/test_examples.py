"""Encoded rows in compact form say what the rows said, from memory and from a file."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest

from fourbit.data.examples import ExampleWriter, length_of, lengths_of, packed_tokens, trained_of
from fourbit.data.render import Example
from fourbit.data.row import Row
from fourbit.errors import DataError
from fourbit.training.identity import rows_hash


def some_examples(rows: int) -> list[list[Example]]:
    """Of each row one to three."""
    draw = random.Random(0)
    made, number = [], 0
    for line in range(rows):
        group = []
        for _ in range(draw.randint(1, 3)):
            ids = [
                draw.choice([0, 1, 49_151, 2**31 - 1, draw.randrange(2**31)])
                for _ in range(draw.randint(2, 9))
            ]
            trained = [False, *(draw.random() < 0.5 for _ in ids[2:]), True]
            group.append(Example(ids, trained, number, f"f{line % 3}.csv:{line + 1}", trained.index(True)))
            number += 1
        made.append(group)
    return made


def written(groups: list[list[Example]], writer: ExampleWriter) -> ExampleWriter:
    for number, group in enumerate(groups):
        file, _, line = group[0].source.partition(":")
        writer.add(Row({}, file, int(line)), 10 * number, group, (number, 2**64 - 1 - number))
    return writer


@pytest.fixture(params=["memory", "file"])
def writer(request) -> ExampleWriter:
    return ExampleWriter(io.BytesIO() if request.param == "file" else None)


def test_all_comes_back(writer):
    groups = some_examples(50)
    flat = [example for group in groups for example in group]
    found = written(groups, writer).examples()
    assert list(found) == flat
    assert [found[place] for place in (0, -1, len(flat) // 2)] == [flat[p] for p in (0, -1, len(flat) // 2)]
    assert found.rows.tolist() == [number for number, group in enumerate(groups) for _ in group]
    assert lengths_of(found) == lengths_of(flat) == [len(example.input_ids) for example in flat]
    assert trained_of(found) == trained_of(flat) == [sum(example.trained) for example in flat]
    assert [length_of(found, 3), length_of(flat, 3)] == [len(flat[3].input_ids)] * 2
    assert rows_hash(found) == rows_hash(flat)
    assert found.words(-1).tolist() == packed_tokens(flat[-1]).tolist()
    used = writer.arrays()[1]
    assert used["number"].tolist() == [10 * number for number in range(50)]
    assert used["normal"].tolist() == [2**64 - 1 - number for number in range(50)]


def test_a_part_in_another_order(writer):
    flat = [example for group in some_examples(20) for example in group]
    found = written(some_examples(20), writer).examples()
    places = np.array([7, 3, 3, 0])
    assert list(found.take(places)) == [flat[place] for place in places]
    assert list(found[2:9:3]) == flat[2:9:3]
    assert list(found[2:9].take(np.array([1]))) == [flat[3]]
    copies = found.take(places, renumber=True)
    assert [example.row for example in copies] == [0, 1, 2, 3]
    assert [example.input_ids for example in copies] == [flat[place].input_ids for place in places]
    assert copies.rows.tolist() == found.rows[places].tolist()
    assert rows_hash(copies) != rows_hash(found.take(places))
    assert list(found[:0]) == []


def test_a_file_that_was_cut_is_named():
    file = io.BytesIO()
    found = written(some_examples(5), ExampleWriter(file)).examples("tokens.bin")
    file.truncate(8)
    with pytest.raises(DataError, match=r"tokens.bin: ends too early"):
        found[len(found) - 1]
