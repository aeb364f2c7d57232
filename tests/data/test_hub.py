"""Addresses of data sets on the hub: which files they stand for, and that nothing else leads there."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from fourbit.config import DataSettings
from fourbit.data.read import located, read_rows
from fourbit.errors import DataError

_SPLITS = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
FILES = {
    "split": ["README.md", ".gitattributes", *(f"data/{name}.parquet" for name in _SPLITS)],
    "plain": ["README.md", "LICENSE.txt", "rows.jsonl", "more/rows.csv"],
    "one": ["openassistant_best_replies_train.jsonl", "openassistant_best_replies_eval.jsonl"],
    "configs": ["a/train.jsonl", "b/train.jsonl", "b/test.jsonl"],
    "pictures": ["cat.png"],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A hub of these data sets, under the owner `o`; what is asked of it."""
    asked: list[tuple[str, str | None]] = []

    def list_files(self, name, revision, repo_type):
        assert repo_type == "dataset"
        asked.append((name, revision))
        return FILES[name.removeprefix("o/")]

    def download(name, file, revision, repo_type):
        path = tmp_path / name.replace("/", "--") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "' + file + '"}\n')
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize(
    ("address", "files"),
    [
        ("o/split", FILES["split"][2:4]),
        ("o/split@main/", FILES["split"][2:4]),
        ("o/split/data/test-00000-of-00001.parquet", [FILES["split"][4]]),
        ("o/plain/more", ["more/rows.csv"]),
        ("o/plain/README.md", ["README.md"]),
        ("o/one", FILES["one"][:1]),
        ("o/configs/b", ["b/train.jsonl"]),
    ],
)
def test_the_files_of_an_address(address, files, hub, tmp_path):
    found = located([f"hf://datasets/{address}"])
    name = "--".join(address.split("@")[0].split("/")[:2])
    assert [path.relative_to(tmp_path / name).as_posix() for path in found] == files
    assert hub == [(name.replace("--", "/"), "main" if "@" in address else None)]


def test_rows_of_the_hub_among_others(hub, tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    rows = read_rows(["hf://datasets/o/one", tmp_path / "a.txt"], DataSettings(train=("x",)))
    assert [row.fields["text"] for row in rows] == ["openassistant_best_replies_train.jsonl", "mine"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://datasets/o", "write a data set on the hub as hf://datasets/OWNER/NAME"),
        ("hf://o/name", "write a data set on the hub as"),
        ("hf:/datasets/o/name", "write a data set on the hub as"),
        ("hf://datasets/o/configs", r"rows in the folders a, b; name one: hf://datasets/o/configs/a$"),
        ("hf://datasets/o/plain", r"rows in the folders \., more; name one"),
        ("hf://datasets/o/pictures", r"no files of \.jsonl .* it has cat\.png"),
        (
            "hf://datasets/o/split/nothing",
            "no file or folder nothing in this data set; it has .gitattributes, README.md, data/test",
        ),
    ],
)
def test_addresses_that_lead_nowhere(address, message, hub):
    with pytest.raises(DataError, match=message):
        located([address])


@pytest.mark.parametrize("path", ["o/one", "data/rows.jsonl", "o", "./o/one", "/o/one", "datasets/o/one"])
def test_a_path_never_asks_the_hub(path, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located([path]) == [Path(path)]
    with pytest.raises(DataError, match="no such file") as error:
        read_rows([path], DataSettings(train=("x",)))
    hinted = "write hf://datasets/o/one for one on the hub" in str(error.value)
    assert hinted == (path in ("o/one", "./o/one"))
    assert hub == []


class TestWithoutANetwork:
    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch):
        def unreachable(*args, **kwargs):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)

    def test_what_was_downloaded_before_is_used(self, tmp_path, monkeypatch):
        snapshot = tmp_path / "datasets--o--one" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        for file in FILES["one"]:
            (snapshot / file).write_text('{"text": "kept"}\n')
        (tmp_path / "datasets--o--one" / "refs").mkdir()
        (tmp_path / "datasets--o--one" / "refs" / "main").write_text("0" * 40)
        find, fetch = huggingface_hub.snapshot_download, huggingface_hub.hf_hub_download
        monkeypatch.setattr(huggingface_hub, "snapshot_download", partial(find, cache_dir=tmp_path))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", partial(fetch, cache_dir=tmp_path))
        rows = read_rows(["hf://datasets/o/one"], DataSettings(train=("x",)))
        assert [row.fields for row in rows] == [{"text": "kept"}]

    def test_what_was_not_is_named(self, monkeypatch):
        def missing(*args, **kwargs):
            raise LocalEntryNotFoundError("not here")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
        with pytest.raises(DataError, match="o/one: not downloaded yet, and the hub cannot be reached"):
            located(["hf://datasets/o/one"])

    def test_a_download_that_fails_is_named(self, monkeypatch):
        def broken(*args, **kwargs):
            raise OSError("Connection reset.\nlong story")

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **kwargs: ["rows.jsonl"])
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
        with pytest.raises(DataError, match=r"o/one/rows.jsonl: cannot be downloaded \(Connection reset\)"):
            located(["hf://datasets/o/one"])
