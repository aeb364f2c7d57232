"""Encoded rows on disk: made once, never used for others, whole or not there, and larger than memory."""

from __future__ import annotations

import errno
import gzip
import json
import os
import stat
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from fourbit.config import DataSettings
from fourbit.data import cache, lines
from fourbit.data.cache import encode_files
from fourbit.data.encode import Encoded, encode
from fourbit.data.examples import ExampleWriter
from fourbit.data.gate import prepare
from fourbit.data.read import iter_rows, read_rows
from fourbit.errors import DataError
from tests.tiny import byte_tokenizer

FROM_CACHE = "tokens from the cache"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "completion": f"yes {n}"}) + "\n" for n in range(40))
    )
    return path


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "fourbit" / "tokens").iterdir())


def encoded(*files: Path, tokenizer=None, **settings) -> Encoded:
    names = list(map(str, files))
    return encode_files(names, tokenizer or byte_tokenizer(), DataSettings(train=names, **settings))[0]


def test_the_second_time_nothing_is_encoded(file, tmp_path, monkeypatch):
    first = encoded(file)
    plain = encode(
        read_rows([file], DataSettings(train=str(file))), byte_tokenizer(), DataSettings(train="x")
    )
    assert list(first.examples) == list(plain.examples)
    assert first.used.tolist() == plain.used.tolist()
    monkeypatch.setattr(cache, "encode", None)
    second = encoded(file)
    assert list(second.examples) == list(plain.examples)
    assert second.used.tolist() == plain.used.tolist()
    assert (first.origin, second.origin) == ("", FROM_CACHE)
    assert second.summary() == f"{plain.summary()}; {FROM_CACHE}"
    (entry,) = entries(tmp_path)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.iterdir()} == {0o600}


def test_the_report_of_cached_rows_is_the_same(file, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("prompt,completion\n0?,yes 0\n1 ?,YES 1\na,b\na,b\n")
    settings = DataSettings(train=(str(file), str(other)), weights=(1.5, 3), heldout=str(other), max_rows=30)
    first, second = (prepare(settings, byte_tokenizer(), 0) for _ in range(2))
    assert second.encoded.origin == FROM_CACHE
    assert first.report == second.report
    assert list(first.train) == list(second.train)
    assert first.report.leaked > 0


def test_whatever_changes_the_tokens_makes_an_entry_of_its_own(file, tmp_path, monkeypatch):
    chatml = byte_tokenizer()
    chatml.chat_template = str(chatml.chat_template) + " "
    other = tmp_path / "other.jsonl"
    other.write_bytes(file.read_bytes())
    seen = [
        encoded(file),
        encoded(file, max_length=100),
        encoded(file, system="Be kind"),
        encoded(file, tokenizer=chatml),
        encoded(other),
        encoded(file, other),
    ]
    file.write_text(file.read_text().replace("yes 7", "no 7"))
    seen.append(encoded(file))
    monkeypatch.setattr(cache, "version", lambda name: "0")
    seen.append(encoded(file))
    assert [one.origin for one in seen] == [""] * 8
    assert len(entries(tmp_path)) == 8
    assert encoded(file).origin == FROM_CACHE
    assert encoded(file, heldout_fraction=0.3, max_rows=2).origin == FROM_CACHE


def test_a_template_that_writes_the_day_is_rendered_anew_each_day(file, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + str(tokenizer.chat_template)
    assert encoded(file, tokenizer=tokenizer).origin == ""
    assert encoded(file, tokenizer=tokenizer).origin == FROM_CACHE

    class Tomorrow:
        @staticmethod
        def today() -> str:
            return "tomorrow"

    monkeypatch.setattr(cache, "date", Tomorrow)
    assert encoded(file, tokenizer=tokenizer).origin == ""


@pytest.mark.parametrize("name", ["tokens.bin", "index.bin", "rows.bin", "account.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_entry_is_made_anew(name, damage, file, tmp_path):
    whole = list(encoded(file).examples)
    place = entries(tmp_path)[0] / name
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 0x10
    if damage == "gone":
        place.unlink()
    else:
        place.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    again = encoded(file)
    assert list(again.examples) == whole
    assert len(entries(tmp_path)) == 1
    assert encoded(file).origin == FROM_CACHE


def test_two_processes_at_once(file, tmp_path):
    program = textwrap.dedent(f"""
        import pathlib, sys, time
        from tests.data.test_cache import encoded
        pathlib.Path(sys.argv[1]).touch()
        while len(list(pathlib.Path({str(tmp_path)!r}).glob("ready*"))) < 2:
            time.sleep(0.001)
        print([example.input_ids for example in encoded(pathlib.Path({str(file)!r})).examples])
    """)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / f"ready{n}")],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
        )
        for n in range(2)
    ]  # fmt: skip
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert printed[0] == printed[1] == f"{[example.input_ids for example in encoded(file).examples]}\n"
    assert len(entries(tmp_path)) == 1


class TestWhatGoesWrong:
    def test_rows_that_are_refused_leave_nothing(self, file, tmp_path):
        file.write_text(file.read_text() + '{"prompt": "a", "completion": ""}\n')
        with pytest.raises(DataError, match=r"rows.jsonl:41: 'completion' is empty"):
            encoded(file)
        assert entries(tmp_path) == []

    def test_a_full_disk(self, file, tmp_path, monkeypatch):
        def add(self, *args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(ExampleWriter, "add", add)
        with pytest.raises(DataError, match=r"no room for the tokens of the data .* XDG_CACHE_HOME"):
            encoded(file)
        assert entries(tmp_path) == []

    def test_a_file_that_changes_meanwhile(self, file, tmp_path, monkeypatch):
        def changing(*args):
            encoded = encode(*args)
            file.write_text(file.read_text() + '{"prompt": "a", "completion": "b"}\n')
            return encoded

        monkeypatch.setattr(cache, "encode", changing)
        with pytest.raises(DataError, match=r"rows.jsonl: changed while it was read"):
            encoded(file)
        assert entries(tmp_path) == []

    def test_a_cache_that_cannot_be_written_is_done_without(self, file, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        before = sorted(tmp_path.iterdir())
        for _ in range(2):
            one = encoded(file)
            assert one.origin == ""
            assert len(list(one.examples)) == 40
        assert sorted(tmp_path.iterdir()) == before

    def test_what_a_killed_process_left_goes_after_a_day(self, file, tmp_path):
        folder = tmp_path / "cache" / "fourbit" / "tokens"
        (folder / "new.partial").mkdir(parents=True)
        (folder / "old.partial").mkdir()
        os.utime(folder / "old.partial", (0, time.time() - 100_000))
        encoded(file)
        assert [path.suffix for path in entries(tmp_path)].count(".partial") == 1


WRITERS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "jsonl": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "json": lambda rows: json.dumps(rows).encode(),
}
WRITERS["jsonl.gz"] = lambda rows: gzip.compress(WRITERS["jsonl"](rows), 1)


@pytest.mark.parametrize(
    "suffix", [pytest.param(suffix, marks=[pytest.mark.slow] * (suffix == "jsonl.gz")) for suffix in WRITERS]
)
def test_rows_larger_than_memory(suffix, tmp_path, monkeypatch):
    """The peak of what Python allocates does not grow with the rows, but for their index."""
    monkeypatch.setattr(lines, "_PIECE", 1 << 12)

    def peak(count: int) -> int:
        file = tmp_path / f"{count}.{suffix}"
        file.write_bytes(WRITERS[suffix]([{"text": f"{n} " + "word " * 60} for n in range(count)]))
        tokenizer = byte_tokenizer()
        tracemalloc.start()
        try:
            settings = DataSettings(train=str(file), heldout_fraction=0.1)
            for _ in iter_rows(settings.train, settings):
                pass
            prepared = prepare(settings, tokenizer, 0)
            assert sum(len(example.input_ids) for example in prepared.train) == prepared.report.tokens
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # what is made once
    fewer, more = peak(600), peak(1800)
    assert more - fewer < 1200 * 300  # of text 310 bytes a row, of tokens 1,240, as lists of integers 12,400
