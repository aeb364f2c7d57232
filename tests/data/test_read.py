"""Every reader, and what each says of a file that it cannot use."""
# ruff: noqa: E501 - messages stand on one line, as they are printed

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st

from fourbit.data import lines as reader
from fourbit.data.lines import json_list
from fourbit.data.packed import Member
from fourbit.data.read import SUFFIXES, Row, read_rows
from fourbit.errors import DataError

RECORDS = [{"prompt": "hé\u2028llo", "completion": 'a, "b"\nc'}, {"prompt": "x\ty", "completion": "☃"}]


def lines(path: Path) -> None:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS), encoding="utf-8"
    )


def indented(path: Path) -> None:
    path.write_text(json.dumps(RECORDS, ensure_ascii=False, indent=2), encoding="utf-8")


def table(delimiter: str):
    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(RECORDS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(RECORDS)

    return write


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)


def folder(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(path))


def one_split(path: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)).save_to_disk(str(path))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Paths in messages are as the user wrote them: here, names alone."""
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    ("name", "write", "at"),
    [
        ("a.jsonl", lines, [1, 2]),
        ("a.json", indented, [2, 6]),
        ("a.csv", table(","), [2, 4]),  # the first record spans two lines
        ("a.tsv", table("\t"), [2, 4]),
        ("a.parquet", parquet, [1, 2]),
        ("saved", folder, [1, 2]),
        ("splits", one_split, [1, 2]),
        ("A.JSONL", lines, [1, 2]),
    ],
)
def test_every_reader_gives_the_same_rows(name, write, at, settings):
    write(Path(name))
    rows = read_rows([name], settings())
    assert rows == [Row(record, name, line) for record, line in zip(RECORDS, at, strict=True)]
    assert rows[1].source == f"{name}:{at[1]}"


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_file_is_one_row(name, settings):
    Path(name).write_bytes("\ufeff# hé\r\n\r\nllo\n".encode())
    assert read_rows([name], settings()) == [Row({"text": "# hé\n\nllo\n"}, name, 1)]


def test_files_follow_each_other(settings):
    lines(Path("a.jsonl"))
    Path("b.txt").write_text("b")
    rows = read_rows(["b.txt", Path("a.jsonl")], settings())
    assert [row.source for row in rows] == ["b.txt:1", "a.jsonl:1", "a.jsonl:2"]


def test_marks_and_blank_ends_are_no_rows(settings):
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n\r\n\n')
    Path("a.json").write_bytes(b'\xef\xbb\xbf [ {"text": "a"},\r\n {"text": "b"} ] \n')
    Path("a.csv").write_bytes(b"\xef\xbb\xbftext\r\na\r\nb\r\n\r\n\n")
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert [row.fields for row in read_rows([name], settings())] == [{"text": "a"}, {"text": "b"}]


def test_long_cells(settings):
    limit = csv.field_size_limit()
    Path("a.csv").write_text("text\n" + "a" * (limit + 1) + "\n")
    assert len(read_rows(["a.csv"], settings())[0].fields["text"]) == limit + 1
    assert csv.field_size_limit() == limit


def test_banking77_as_the_demo_carries_it(settings):
    path = Path(__file__).parents[2] / "demo" / "banking77" / "test.csv"
    rows = read_rows([path], settings(prompt="{text}", completion="{category}"))
    assert len(rows) == 3080
    assert rows[1].fields == {
        "text": "I still have not received my new card, I ordered over a week ago.",
        "category": "card arrival",
    }
    assert rows[1].line == 3


MALFORMED = [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n', "a.jsonl:2: the row is empty; remove it"),
    ("a.jsonl", b'{"text": "a"}\n{}\n', "a.jsonl:2: the row is empty; remove it"),
    ("a.jsonl", b'{"text": "a"}\n{"text": }\n', "a.jsonl:2: not valid JSON (Expecting value, column 10); repair the row"),
    ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "a.jsonl:2: not valid JSON (nested too deeply); repair the row"),
    ("a.jsonl", b'"a"\n', "a.jsonl:1: the row is text, must be an object with named columns"),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl:2: the row is a list, must be an object with named columns"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not valid UTF-8 (byte 10); save the file as UTF-8"),
    ("a.jsonl", b"", "a.jsonl: the file is empty; give a file with at least one row"),
    ("a.jsonl", b"\n\n", "a.jsonl: holds no rows; give a file with at least one"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"txt": "b"}\n',
        "a.jsonl:2: cannot tell what to train on from the columns txt; name them messages, prompt and completion, "
        "instruction and output, question and answer, or text, or set data.prompt and data.completion",
    ),
    ("a.json", b"[]", "a.json: holds no rows; give a file with at least one"),
    ("a.json", b" \n", "a.json: holds no rows; give a file with at least one"),
    ("a.json", b'{"text": "a"}\n', "a.json:1: not a list of objects; write [{...}, ...], or name it .jsonl if it has one per line"),
    ("a.json", b'[\n{"text": "a"},\n3]', "a.json:3: the row is a number (3), must be an object with named columns"),
    ("a.json", b'[{"text": "a"},\n{}]', "a.json:2: the row is empty; remove it"),
    ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "a.json:2: not valid JSON (Expecting ':' delimiter, column 9); repair the row"),
    ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "a.json:2: not valid JSON (expected a comma and an object, or the list's end); repair the row"),
    ("a.json", b'[{"text": "a"},\n]', "a.json:1: not valid JSON (expected a comma and an object, or the list's end); repair the row"),
    ("a.json", b'[{"text": "a"}\n', "a.json:2: not valid JSON (expected a comma and an object, or the list's end); repair the row"),
    ("a.json", b'[{"text": "a"}]\n\n[]', "a.json:3: text after the end of the list; remove it"),
    ("a.json", b'[{"text": "\xff"}]', "a.json: not valid UTF-8 (byte 11); save the file as UTF-8"),
    ("a.json", b"[" * 100_000, "a.json:1: not valid JSON (nested too deeply); repair the row"),
    ("a.csv", b"text,label\n", "a.csv: holds no rows; give a file with at least one"),
    ("a.csv", b"text,label\na,b\n\nc,d\n", "a.csv:3: the row is empty; remove it"),
    ("a.csv", b"text,label\na,b\n,\n", "a.csv:3: the row is empty; remove it"),
    (
        "a.csv",
        b'text,label\n"a\nb",c\nd,e,f\n',
        "a.csv:4: the row has 3 values and the header 2 columns; repair it, and quote values that hold the delimiter",
    ),
    ("a.csv", b'text,label\n"a,b\n', "a.csv:2: not a valid row (unexpected end of data); repair its quotes"),
    ("a.csv", b'text,label\n"a"b,c\n', "a.csv:2: not a valid row (',' expected after '\"'); repair its quotes"),
    ("a.csv", b"text,,label\na,b,c\n", "a.csv:1: column 2 of the header has no name; name it"),
    ("a.csv", b"text, text\na,b\n", "a.csv:1: the header names the column 'text' twice; rename one"),
    ("a.csv", b"text\n\xff\n", "a.csv: not valid UTF-8; save the file as UTF-8"),
    ("a.txt", b" \n", "a.txt: holds no rows; give a file with at least one"),
    ("a.txt", b"a\xff", "a.txt: not valid UTF-8 (byte 1); save the file as UTF-8"),
    (
        "a.doc",
        b"a",
        "a.doc: cannot read files of this kind; use one of .jsonl .json .csv .tsv .txt .md .parquet .gz .zst .zip or a folder of .txt and .md files or of `datasets`",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_files_that_cannot_be_used(name, content, message, settings):
    Path(name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows([name], settings())
    assert str(error.value) == message


@tried(max_examples=300, deadline=None)
@given(data=st.data(), piece=st.integers(1, 60))
def test_a_list_read_in_pieces_is_the_list(data, piece):
    """Rows, their lines and whatever is refused do not depend on where pieces end."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )
    rows = data.draw(
        st.lists(st.dictionaries(st.text(min_size=1, max_size=3), values, min_size=1), max_size=4)
    )
    text = json.dumps(
        rows, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=data.draw(st.booleans())
    )
    content = bytearray(text.encode())
    if data.draw(st.booleans()):  # one damage: of several, pieces decide which is found first
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
            st.sampled_from(b'\xff"\\,:]}{ \n0e')
        )
    found = []
    for size in (1 << 20, piece):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "_PIECE", size)
            member = Member("a.json", io.BytesIO(content))
            read: list[object] = []
            try:
                read += [(repr(row.fields), row.line) for row in json_list(member)]
            except DataError as error:
                read.append(str(error))
        found.append(read)
    assert found[0] == found[1]


def test_missing_files_name_their_nearest_neighbour(settings):
    lines(Path("train.jsonl"))
    Path("other.csv").write_text("text\na\n")
    for name, message in {
        "trian.jsonl": "trian.jsonl: no such file (did you mean 'train.jsonl'?); check the path",
        "zzz": "zzz: no such file; check the path",
        "no/train.jsonl": "no/train.jsonl: no such file, and no folder no; check the path",
    }.items():
        with pytest.raises(DataError) as error:
            read_rows(["other.csv", name], settings())
        assert str(error.value) == message


def test_no_files(settings):
    with pytest.raises(DataError) as error:
        read_rows([], settings())
    assert str(error.value) == "no data files were given; set data.train to a file or a list of files"


def test_folders_that_cannot_be_used(settings):
    Path("plain").mkdir()
    splits = {name: datasets.Dataset.from_list(RECORDS) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk("two")
    folder(Path("broken"))
    (Path("broken") / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    for name, message in {
        "plain": "plain: a folder without .txt and .md files, and not one that `datasets` saved; name the files in it",
        "two": "two: holds the splits test, train; name one, such as two/test",
    }.items():
        with pytest.raises(DataError) as error:
            read_rows([name], settings())
        assert str(error.value) == message
    with pytest.raises(DataError, match=r"^broken: not a readable `datasets` folder \(.+\); save it again$"):
        read_rows(["broken"], settings())
    assert len(read_rows(["two/test"], settings())) == 2


def test_parquet_that_cannot_be_used(settings):
    Path("a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"^a\.parquet: not a readable Parquet file \(.+\); write it again$"):
        read_rows(["a.parquet"], settings())
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), "b.parquet")
    with pytest.raises(DataError) as error:
        read_rows(["b.parquet"], settings())
    assert str(error.value) == "b.parquet:2: the row is empty; remove it"


@pytest.mark.parametrize(
    ("name", "write", "module", "message"),
    [
        ("a.parquet", parquet, "pyarrow", "a.parquet: reading Parquet needs pyarrow; `pip install pyarrow`"),
        ("saved", folder, "datasets", "saved: reading this folder needs datasets; `pip install datasets`"),
    ],
)
def test_packages_that_are_not_installed(name, write, module, message, settings, monkeypatch):
    write(Path(name))
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError) as error:
        read_rows([name], settings())
    assert str(error.value) == message


def test_the_readers_are_those_the_messages_name():
    assert SUFFIXES == (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet", ".gz", ".zst", ".zip")
