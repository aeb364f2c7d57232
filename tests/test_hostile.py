"""Files that someone made to do harm, each refused in one line that says what and where."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file, save_file

import fourbit
from fourbit import limits
from fourbit.config import DataSettings
from fourbit.config_file import load_config
from fourbit.data.encode import encode
from fourbit.data.read import read_rows
from fourbit.errors import ConfigError, DataError, ModelError
from fourbit.model.adapters import load_adapter
from fourbit.model.base import open_base
from fuzz.targets import CORPUS
from tests.tiny import byte_tokenizer, llama, save_llama

ADAPTER = CORPUS.parent / "folders" / "adapter"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(save_llama(tmp_path / "model"))


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_billion_layers(model: Path) -> None:
    change_json(model / "config.json", num_hidden_layers=10**9)
    with pytest.raises(ModelError, match=r"config\.json: num_hidden_layers is 1000000000; models have up to"):
        fourbit.load(model)


def test_an_embedding_that_no_file_holds(model: Path) -> None:
    change_json(model / "config.json", vocab_size=10**9)
    with pytest.raises(ModelError, match=r"describes [\d,]+ parameters and the files hold [\d,]+ bytes"):
        fourbit.load(model)


def rewrite_header(change: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def move(header: dict[str, dict[str, object]], offsets: list[int]) -> None:
    header["model.norm.weight"]["data_offsets"] = offsets


@pytest.mark.parametrize(
    "damage",
    [
        rewrite_header(lambda header: move(header, [0, 128])),  # over another tensor
        rewrite_header(lambda header: move(header, [-128, 0])),
        rewrite_header(lambda header: move(header, [0, 2**62])),
        rewrite_header(lambda header: header["model.norm.weight"].update(shape=[2**40])),
        rewrite_header(lambda header: header["model.norm.weight"].update(dtype="F99")),
        lambda file: file.write_bytes(struct.pack("<Q", 2**62) + b"{}"),  # a header of exabytes
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
    ],
)
def test_safetensors_headers_that_lie(model: Path, damage: Callable[[Path], None]) -> None:
    damage(model / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        fourbit.load(model)


def test_not_a_number(model: Path) -> None:
    weights = load_file(str(model / "model.safetensors"))
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, str(model / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' has nan at \[3\]"):
        fourbit.load(model)


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "{a: " * 2000, "&a [1]: 2", "a: " + "9" * 300_000])
def test_settings_without_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")


def test_json_too_deep(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": ' + "[" * 2000 + "]" * 2000 + "}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        list(read_rows([file], DataSettings(train=str(file))))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "come to an end"),
        ("{{ 'a' * 10**9 }}", "come to an end|too many"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation .*unsafe"),
    ],
)
def test_chat_templates_are_programs(
    tmp_path: Path, template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    settings = DataSettings(train=str(file))
    with pytest.raises(DataError, match=message):
        encode(read_rows([file], settings), tokenizer, settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, "does not fit its settings, rank 1e.09"),
        ({"target_modules": "([a-z_.0-9]+)+!"}, r"the pattern .* cannot be used \(it ran for more than"),
        ({"layer_replication": [[0, 10**6]]}, "layer_replication"),
    ],
)
def test_adapters_that_ask_for_too_much(
    tmp_path: Path, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    folder = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    change_json(folder / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_adapter(llama(), folder)


def test_an_adapter_for_another_base(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="this adapter does not fit the model"):
        load_adapter(llama(), ADAPTER)


def test_an_arrow_folder_that_names_files_outside(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CORPUS.parent / "folders" / "arrow", tmp_path / "rows"))
    change_json(folder / "state.json", _data_files=[{"filename": "../../etc/passwd"}])
    with pytest.raises(DataError, match="names a file outside the folder"):
        list(read_rows([folder], DataSettings(train=str(folder))))


@pytest.mark.parametrize("place", [8, 16])  # numbers of tensors and of metadata
def test_gguf_counts_that_lie(tmp_path: Path, place: int) -> None:
    data = bytearray((CORPUS / "gguf" / "llama").read_bytes())
    data[place : place + 8] = struct.pack("<Q", 2**60)
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.gguf"):
        open_base(tmp_path / "model.gguf")


def test_gguf_with_more_layers_than_tensors(tmp_path: Path) -> None:
    data = bytearray((CORPUS / "gguf" / "llama").read_bytes())
    place = data.find(b"llama.block_count") + len(b"llama.block_count") + 4
    data[place : place + 4] = struct.pack("<I", 1999)
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"llama\.block_count is 1999 and the file holds \d+ tensors"):
        open_base(tmp_path / "model.gguf")


def test_the_names_of_gguf_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at every module: files that claim many layers took hours."""
    made = []
    original = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *given: made.append(given) or original(*given))
    shutil.copy(CORPUS / "gguf" / "llama", tmp_path / "model.gguf")
    open_base(tmp_path / "model.gguf")
    assert len(made) == 1


def test_nothing_saved_is_touched(model: Path) -> None:
    """A load that fails leaves every byte as it was."""
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    with pytest.raises(ModelError):
        load_adapter(fourbit.load(model, compute_dtype="float32")[0], ADAPTER)
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
