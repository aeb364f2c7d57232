"""Compressed files, folders of text, several files with weights."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourbit.config import DataSettings
from fourbit.config_file import resolve
from fourbit.data import packed
from fourbit.data.gate import prepare
from fourbit.data.read import iter_rows, read_rows
from fourbit.errors import ConfigError, DataError
from tests.tiny import byte_tokenizer

SETTINGS = DataSettings(train="x")
LINES = b'{"text": "one"}\n{"text": "two"}\n'


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zipped(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return sink.getvalue()


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.zip"])
def test_rows_and_where_they_stand(name, tmp_path):
    if name.endswith(".gz"):
        content, inner = gzip.compress(LINES), "a.jsonl"
    elif name.endswith(".zst"):
        content, inner = zstd(LINES), "a.jsonl"
    else:
        content, inner = zipped({"sub/a.jsonl": LINES}), "a.zip/sub/a.jsonl"
    rows = read_rows([put(tmp_path, name, content)], SETTINGS)
    assert [row.fields["text"] for row in rows] == ["one", "two"]
    assert [row.source for row in rows] == [f"{tmp_path / inner}:1", f"{tmp_path / inner}:2"]


def test_an_archive_of_several_kinds_in_the_order_of_names(tmp_path):
    files = {"c.csv": b"text\nthree\n", "b.md": b"two", "a.json": b'[{"text": "one"}]'}
    rows = read_rows([put(tmp_path, "a.zip", zipped(files))], SETTINGS)
    assert [row.fields["text"] for row in rows] == ["one", "two", "three"]


def test_bombs_are_refused_before_they_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "ALWAYS_READ", 1 << 20)
    air = b" " * (8 << 20)
    many = {f"{n}.txt": b"x" * (1 << 20) for n in range(3)}
    bombs = {
        "a.txt.gz": gzip.compress(air),
        "a.txt.zst": zstd(air),
        "a.zip": zipped({"a.txt": air}),
        "many.zip": zipped(many),
    }
    for name, content in bombs.items():
        with pytest.raises(DataError, match=r"grows to more than .* when unpacked, over 200 times its size"):
            read_rows([put(tmp_path, name, content)], SETTINGS)
    monkeypatch.setattr(packed, "MOST_FILES", 2)
    with pytest.raises(DataError, match="holds more than 2 files"):
        read_rows([put(tmp_path, "many.zip", zipped(many))], SETTINGS)


def test_a_zip_that_lies_about_sizes_is_refused(tmp_path):
    content = bytearray(zipped({"a.txt": b"hello" * 100}))
    place = content.index(b"PK\x01\x02") + 24
    content[place : place + 4] = (5).to_bytes(4, "little")
    with pytest.raises(DataError, match=r"a\.zip: cannot be unpacked"):
        read_rows([put(tmp_path, "a.zip", bytes(content))], SETTINGS)


def test_what_else_is_refused(tmp_path):
    encrypted = bytearray(zipped({"a.txt": b"x"}))
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    cases = {
        "e.zip": (bytes(encrypted), "e.zip/a.txt: is encrypted; unpack it first"),
        "n.zip": (zipped({"in.zip": zipped({})}), "n.zip/in.zip: cannot read files of this kind inside"),
        "k.doc.gz": (gzip.compress(b"x"), "k.doc: cannot read files of this kind inside a compressed one"),
        "c.jsonl.gz": (gzip.compress(LINES)[:-9], "c.jsonl.gz: cannot be unpacked"),
        "d.jsonl.zst": (b"nothing", "d.jsonl.zst: cannot be unpacked"),
    }
    for name, (content, message) in cases.items():
        with pytest.raises(DataError) as error:
            read_rows([put(tmp_path, name, content)], SETTINGS)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_members_are_unpacked_as_they_are_read(tmp_path, monkeypatch):
    """Rows before a damage, and before a limit, come out; what is read ahead is a piece and not the rest."""
    monkeypatch.setattr(packed, "ALWAYS_READ", 1 << 20)
    lines = b'{"text": "a"}\n' * 200_000
    for name, content, message in (
        ("cut.jsonl.gz", gzip.compress(lines, 1)[:-4], "cut.jsonl.gz: cannot be unpacked"),
        ("long.zip", zipped({"a.jsonl": lines}), "grows to more than 1 MiB"),
    ):
        rows = iter_rows([put(tmp_path, name, content)], SETTINGS)
        assert next(rows).fields == {"text": "a"}
        with pytest.raises(DataError, match=message):
            list(rows)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    name=st.sampled_from(["a.jsonl.gz", "a.jsonl.zst", "a.zip"]),
)
def test_damage_is_one_clear_error(data, name, tmp_path):
    whole = {
        "a.jsonl.gz": gzip.compress(LINES),
        "a.jsonl.zst": zstd(LINES),
        "a.zip": zipped({"a.jsonl": LINES}),
    }[name]
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    with suppress(DataError):  # any other exception fails
        assert all(
            isinstance(row.fields, dict) for row in read_rows([put(tmp_path, name, bytes(content))], SETTINGS)
        )


def test_a_folder_of_text(tmp_path):
    (tmp_path / "b").mkdir()
    put(tmp_path, "z.txt", b"three")
    put(tmp_path, "b/a.md", b"one")
    put(tmp_path, "b/b.TXT", b"two")
    put(tmp_path, "b/c.log", b"no")
    (tmp_path / "b" / "around").symlink_to(tmp_path)
    rows = read_rows([tmp_path], SETTINGS)
    assert [row.fields["text"] for row in rows] == ["one", "two", "three"]
    assert rows[0].source == f"{tmp_path}/b/a.md:1"


class TestWeights:
    def files(self, folder: Path) -> list[str]:
        for name in ("a", "b"):
            lines = (json.dumps({"text": f"{name}{n}"}) for n in range(10))
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        return [str(folder / "a.jsonl"), str(folder / "b.jsonl")]

    def test_rows_are_used_as_often_as_their_file_says(self, tmp_path):
        train = DataSettings(train=self.files(tmp_path), weights=(2.5, 0.3), heldout_fraction=0)
        prepared = prepare(train, byte_tokenizer(), 0)
        counts = Counter(Path(example.source).name for example in prepared.train)
        uses = {name[0]: sorted(n for k, n in counts.items() if k[0] == name[0]) for name in ("a", "b")}
        assert uses == {"a": [2] * 5 + [3] * 5, "b": [1] * 3}
        assert [example.row for example in prepared.train] == list(range(28))
        assert prepared.report.duplicates == 0
        again = prepare(train, byte_tokenizer(), 0)
        other = prepare(train, byte_tokenizer(), 1)
        assert [e.source for e in again.train] == [e.source for e in prepared.train]
        assert [e.source for e in other.train] != [e.source for e in prepared.train]

    def test_held_out_rows_are_not_weighted(self, tmp_path):
        train = DataSettings(train=self.files(tmp_path), weights=(3, 1), heldout_fraction=0.5)
        prepared = prepare(train, byte_tokenizer(), 0)
        assert len({example.source for example in prepared.heldout}) == len(prepared.heldout) == 10
        assert not {e.source for e in prepared.heldout} & {e.source for e in prepared.train}

    @pytest.mark.parametrize("weights", [[1.0], [1, -1], [0, 1]])
    def test_wrong_weights(self, weights):
        with pytest.raises(ConfigError, match="weights"):
            resolve({"model": {"path": "m"}, "data": {"train": ["a", "b"], "weights": weights}})
