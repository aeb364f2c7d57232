"""Weights whose parts do not fit each other, each refused before a model is made of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fourbit
from fourbit.errors import ModelError
from fourbit.exporting.adapter import read_adapter as read_for_merging
from fourbit.model.adapter_folder import read_config
from fourbit.model.adapters import add_lora, load_adapter
from fourbit.model.base import open_base
from fourbit.model.save import save_quantized
from tests.tiny import llama, save_llama

Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"
Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a bitsandbytes checkpoint, double-quantized."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    save_quantized(*fourbit.load(plain, compute_dtype="float32"), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    add_lora(llama(), r=2, target_modules=["q_proj", "down_proj"]).save_pretrained(str(folder))
    return folder


def changed(source: Path, folder: Path, edit: Edit, file: str = "model.safetensors") -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(str(folder / file))
    edit(tensors)
    save_file(tensors, str(folder / file), metadata={"format": "pt"})
    return folder


def refused_by_both(folder: Path, message: str) -> None:
    """By loading, and by opening it for a merge or an export and reading it."""
    with pytest.raises(ModelError, match=message):
        fourbit.load(folder, compute_dtype="float32")
    with pytest.raises(ModelError, match=message):
        [tensor.read() for tensor in open_base(folder).tensors.values()]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({Q: t[Q].reshape(-1)}), r"\[4096\], the config says \[64, 64\]"),
        (lambda t: t.update({Q: t[Q][:, :32].clone()}), r"\[64, 32\], the config says \[64, 64\]"),
        (lambda t: t.update({Q: t[Q].to(torch.int16)}), "stored as torch.int16, which holds no weights"),
        (lambda t: t[Q][3].fill_(torch.inf), r"has inf at \[3, 0\]"),
    ],
    ids=["flat", "narrow", "whole numbers", "infinite"],
)
def test_16_bit_weights(plain: Path, tmp_path: Path, edit: Edit, message: str) -> None:
    refused_by_both(changed(plain, tmp_path / "model", edit), rf"q_proj\.weight.*{message}")


def test_a_config_with_nan(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": float("nan")}))
    refused_by_both(folder, r"config\.json: rms_norm_eps is NaN")


def state(**settings: object) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        text = json.dumps(json.loads(bytes(tensors[STATE].tolist())) | settings)
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return edit


def also_as(name: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        parts = {key: part.clone() for key, part in tensors.items() if key.startswith(Q)}
        tensors.pop(name, None)
        tensors.update({key.replace(Q, name): part for key, part in parts.items()})

    return edit


BROKEN_4_BIT: dict[str, tuple[Edit, str]] = {
    "a terabyte": (state(shape=[2**31, 2**31]), r"has 2048 values .* needs 2305843009213693952"),
    "another shape": (state(shape=[32, 128]), r"has shape \[32, 128\], the config says \[64, 64\]"),
    "a negative shape": (state(shape=[-64, -64]), "malformed"),
    "a block size": (state(blocksize=2**40), "malformed"),
    "another block size": (state(blocksize=128), r"absmax' has 64 values .* needs 32"),
    "an offset that fp32 has not": (state(nested_offset=1e300), "malformed"),
    "NaN as offset": (state(nested_offset=float("nan")), "malformed"),
    "no JSON": (lambda t: t.update({STATE: torch.zeros(9, dtype=torch.uint8)}), "malformed"),
    "JSON without end": (
        lambda t: t.update({STATE: torch.full((9000,), 91, dtype=torch.uint8)}),
        "malformed",
    ),
    "a code short": (lambda t: t.update({Q: t[Q][:-1].clone()}), "has 2047 values .* needs 2048"),
    "codes as fp32": (lambda t: t.update({Q: t[Q].float()}), "has 2048 values .* needs 512"),
    "a scale short": (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][1:].clone()}), "has 63 values"),
    "scales as fp64": (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"].double()}), "torch.float64"),
    "no scales": (lambda t: t.pop(f"{Q}.absmax"), "absmax' is missing"),
    "an outer scale too many": (
        lambda t: t.update({f"{Q}.nested_absmax": t[f"{Q}.nested_absmax"].repeat(2)}),
        "nested_absmax' has 2 values",
    ),
    "NaN as scale": (lambda t: t[f"{Q}.nested_absmax"].fill_(torch.nan), "has nan at"),
    "other values for the codes": (lambda t: t[f"{Q}.quant_map"].fill_(0.5), "not the map of its type"),
    "a norm in 4 bits": (also_as("model.norm.weight"), r"\[64, 64\], the config says \[64\]"),
    "a layer that is not there": (also_as("model.layers.9.mlp.up_proj.weight"), "has no place"),
}


@pytest.mark.parametrize("name", BROKEN_4_BIT)
def test_4_bit_weights(packed: Path, tmp_path: Path, name: str) -> None:
    edit, message = BROKEN_4_BIT[name]
    refused_by_both(changed(packed, tmp_path / "model", edit), f"{tmp_path.name}.*{message}")


def test_an_adapter_of_whole_numbers(adapter: Path, tmp_path: Path) -> None:
    key = f"base_model.model.{Q.removesuffix('.weight')}.lora_A.weight"
    file = "adapter_model.safetensors"
    folder = changed(adapter, tmp_path / "a", lambda t: t.update({key: t[key].to(torch.uint8)}), file)
    message = rf"{file}: '{key}' is stored as torch\.uint8, which holds no weights"
    with pytest.raises(ModelError, match=message):
        load_adapter(llama(), folder)
    found = read_for_merging(folder, llama(), read_config(folder))
    with pytest.raises(ModelError, match=message):
        found.deltas[Q].apply(torch.zeros(64, 64))


def test_a_rank_in_the_settings_that_no_layer_has(adapter: Path, tmp_path: Path) -> None:
    """PEFT writes such adapters where patterns name every layer; one of a billion would be made."""
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    config = json.loads((folder / "adapter_config.json").read_text())
    for rank in (64, 10**9):
        changes = {"r": rank, "rank_pattern": {".*_proj": 2}}
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        if rank == 64:
            load_adapter(llama(), folder)
    with pytest.raises(ModelError, match=r"names the rank 1000000000, and none that is stored is over"):
        load_adapter(llama(), folder)


def test_an_adapter_without_some_of_its_layers(adapter: Path, tmp_path: Path) -> None:
    def half(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "layers.1." in key]:
            del tensors[key]

    folder = changed(adapter, tmp_path / "a", half, "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"it has nothing for 'model\.layers\.1"):
        load_adapter(llama(), folder)


def test_an_adapter_cannot_have_a_package_imported(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT imports the module that `megatron_core` names."""
    (tmp_path / "harmful_package.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"megatron_config": {"a": 1}, "megatron_core": "harmful_package"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="names a package to import"):
        load_adapter(llama(), folder)
    assert "harmful_package" not in sys.modules


@pytest.mark.parametrize(("kept", "added"), [(40, {}), (0, {}), (999, {"far": 10**7})])
def test_a_tokenizer_of_another_model(plain: Path, tmp_path: Path, kept: int, added: dict[str, int]) -> None:
    """Of a model with a much smaller vocabulary, without any, with an id far beyond the model's rows."""
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:kept]) | added
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"model: the tokenizer has ids up to \d+ and the model 259 rows"):
        fourbit.load(folder, compute_dtype="float32")
