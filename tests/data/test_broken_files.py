"""Data files that grow, share, climb or never end, each refused in one line."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Regex, pre_tokenizers

from fourbit import limits
from fourbit.config import DataSettings
from fourbit.data.read import read_rows
from fourbit.data.tokens import TextTokenizer
from fourbit.errors import DataError
from fuzz.targets import CORPUS
from tests.tiny import byte_tokenizer

LINE = b'{"text": "a"}\n'
SETTINGS = DataSettings(train="unused")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows([name], SETTINGS)


def zipped(*entries: tuple[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return packed.getvalue()


BOMB = b" " * (80 << 20)
BOMBS = {
    "a.jsonl.gz": lambda: gzip.compress(BOMB, 1),
    "a.jsonl.zst": lambda: pyarrow.compress(BOMB, codec="zstd", asbytes=True),
    "one.zip": lambda: zipped(("a.jsonl", BOMB)),
    "many.zip": lambda: zipped(*((f"{i}.jsonl", BOMB[: 40 << 20]) for i in range(2))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_grows_without_measure_when_unpacked(name: str) -> None:
    Path(name).write_bytes(BOMBS[name]())
    assert Path(name).stat().st_size < 1 << 20
    refused(name, rf"^{name}.* grows to more than \d+ MiB when unpacked")


def test_names_in_an_archive_lead_nowhere() -> None:
    Path("a.zip").write_bytes(zipped(("../../up.jsonl", LINE), ("/abs.jsonl", LINE)))
    before = sorted(Path("..").rglob("*"))
    assert [row.fields for row in read_rows(["a.zip"], SETTINGS)] == [{"text": "a"}] * 2
    assert sorted(Path("..").rglob("*")) == before
    assert not Path("/abs.jsonl").exists()


def test_archives_in_archives_and_too_many_files() -> None:
    Path("nested.zip").write_bytes(zipped(("a.zip", zipped(("a.jsonl", LINE)))))
    refused("nested.zip", r"nested\.zip/a\.zip: cannot read files of this kind inside a compressed one")
    Path("many.zip").write_bytes(zipped(*((f"{i}.jsonl", b"") for i in range(10_001))))
    refused("many.zip", "holds more than 10,000 files")


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["a.pkl", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.zip"])
def test_a_pickle_is_never_loaded(name: str) -> None:
    Path(name).write_bytes(pickle.dumps(Harmful(), protocol=0 if name == "a.csv" else 4))
    with pytest.raises(DataError):
        read_rows([name], SETTINGS)
    assert not Path("executed").exists()


@contextmanager
def taking_at_most(limit: int) -> Iterator[None]:
    """A block in which Arrow holds no more than so many bytes at any time."""
    before = pyarrow.default_memory_pool()
    # The system's: others keep addresses that they have got, which is what is limited.
    own = pyarrow.proxy_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_memory_pool(own)
    try:
        yield
    finally:
        pyarrow.set_memory_pool(before)
    assert own.max_memory() < limit


def test_rows_that_share_one_long_value() -> None:
    """A Parquet file of kilobytes whose rows are the same megabyte."""
    column = pyarrow.array(["a" * (1 << 20)] * 200).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), "coded.parquet", compression="zstd")
    plain = pyarrow.table({"text": ["a" * (1 << 20)] * 200})
    pyarrow.parquet.write_table(plain, "plain.parquet", compression="zstd")
    del column, plain
    for name in ("coded.parquet", "plain.parquet"):
        assert Path(name).stat().st_size < 1 << 20
        tracemalloc.start()
        with taking_at_most(150 << 20):
            refused(name, rf"^{name}: grows to more than \d+ MiB when unpacked")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
        tracemalloc.stop()


def test_columns_without_values() -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.nulls(700_000, pyarrow.string())}), "a.parquet"
    )
    refused("a.parquet", r"^a\.parquet:1: the row is empty")
    with pytest.raises(DataError, match=r"^a\.parquet: grows to more than 64 MiB"):
        read_rows(["a.parquet"], DataSettings(train="unused", allow=["empty"]))


def test_a_row_that_is_a_list_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a kilobyte on disk; read, it takes thirteen bytes for each of its twenty million values."""
    nothing = pyarrow.nulls(20_000_000, pyarrow.string())
    column = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(nothing)], pyarrow.int32()), nothing)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), "a.parquet")
    assert Path("a.parquet").stat().st_size < 1000
    del nothing, column
    monkeypatch.setattr(limits, "MEMORY", 48 << 20)
    with taking_at_most(160 << 20):
        refused("a.parquet", r"^a\.parquet: cannot be read \(it took more than 48 MiB of memory\)")


def test_damaged_statistics_do_not_end_the_process() -> None:
    """pyarrow ends it where it is asked for the columns of this file, which the fuzzer found."""
    content = (CORPUS / "parquet" / "statistics").read_bytes()
    Path("a.parquet").write_bytes(content)
    reason = "histogram size mismatch|Unexpected end of stream"  # pyarrow 26 and 18
    refused("a.parquet", rf"^a\.parquet: not a readable Parquet file \(.*({reason})")


def test_other_types_whose_rows_share_values() -> None:
    kind = pyarrow.list_(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([["a"]]).cast(kind)}), "a.parquet")
    refused("a.parquet", r"^a\.parquet: .*column 'text' is .*dictionary.*, whose rows can share values")


def test_categories_are_text() -> None:
    """What pandas writes for a column of categories is read like any other."""
    column = pyarrow.array(["a", "b", None, "a"]).dictionary_encode()
    table = pyarrow.table({"prompt": ["x"] * 4, "completion": column})
    pyarrow.parquet.write_table(table, "a.parquet")
    rows = read_rows(["a.parquet"], SETTINGS, check=lambda row, settings: None)
    assert [row.fields["completion"] for row in rows] == ["a", "b", None, "a"]


def test_links_and_pipes_in_a_folder() -> None:
    Path("links").mkdir()
    Path("links/a.txt").symlink_to("/etc/hostname")
    refused("links", r"links/a\.txt: not a file in this folder but a link out of it")
    Path("pipes").mkdir()
    os.mkfifo("pipes/a.txt")
    refused("pipes", r"pipes/a\.txt: not a file in this folder")


def test_a_message_cannot_command_a_terminal() -> None:
    Path("a.jsonl").write_text(json.dumps({"te\x1b[31mxt\u202e": "a"}) + "\n")
    with pytest.raises(DataError) as error:
        read_rows(["a.jsonl"], SETTINGS)
    assert str(error.value).isprintable()
    assert r"te\x1b[31mxt\u202e" in str(error.value)


def test_a_pattern_of_a_tokenizer_that_does_not_end() -> None:
    tokenizer = byte_tokenizer()
    pattern = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pattern, backend.pre_tokenizer])
    with pytest.raises(DataError, match=r"the tokenizer breaks off .*retry-limit"):
        TextTokenizer(tokenizer)(["a" * 50 + "b"])
