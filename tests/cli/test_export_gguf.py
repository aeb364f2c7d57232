"""`fourbit export --to gguf` and `--to lora-gguf`: one file each, its record beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fourbit.exporting import provenance
from fourbit.exporting.merge import merged_tensors
from fourbit.model.base import open_base
from tests.cli.conftest import Fourbit, furnish, train_in
from tests.cli.test_merge_export import SMALL, UNREAD
from tests.exporting.gguf.models import byte_level, model

TRAIN = ["merging" if word == "model" else word for word in SMALL]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """The folder of a run on a model whose tokenizer merges bytes: llama.cpp loads no other."""
    folder = tmp_path_factory.mktemp("trained")
    furnish(folder, models)
    tokenizer = byte_level()
    model("llama", len(tokenizer)).to(torch.bfloat16).save_pretrained(str(folder / "merging"))
    tokenizer.save_pretrained(str(folder / "merging"))
    return train_in(folder, TRAIN).parent


@pytest.fixture
def run(trained: Path, here: Path) -> str:
    for name in ("merging", "run"):
        shutil.copytree(trained / name, here / name)
    return "run"


@pytest.mark.parametrize("quant", ["F32", "F16"])
def test_a_merged_gguf_holds_the_merged_weights(fourbit: Fourbit, run: str, here: Path, quant: str) -> None:
    code, out, error = fourbit("export", UNREAD, run, "--to", "gguf", "--quant", quant, "run.gguf")
    assert (code, error) == (0, "")
    assert "serve it: llama-server -m run.gguf" in out
    expected = merged_tensors("merging", "run/adapter", dtype=None).tensors
    found = open_base("run.gguf").tensors
    assert found.keys() == expected.keys()
    dtype = {"F32": torch.float32, "F16": torch.float16}[quant]
    for name, tensor in found.items():
        wanted = expected[name].read()
        if wanted.ndim == 2:  # vectors stay in fp32
            wanted = wanted.to(dtype)
        assert torch.equal(tensor.read(), wanted.float()), name
    assert [step.kind for step in provenance.read(here / "run.gguf")] == ["train", "merge", "export"]
    assert fourbit("export", UNREAD, run, "--to", "gguf", "run.gguf")[0] == 2
    code, _, error = fourbit("merge", UNREAD, "run.gguf", "again", "--adapter", "run/adapter")
    assert (code, "is merged into it already" in error) == (4, True)


def test_the_adapter_alone(fourbit: Fourbit, run: str, here: Path) -> None:
    code, out, _ = fourbit("export", UNREAD, run, "--to", "lora-gguf", "adapter.gguf")
    assert code == 0
    assert "llama-server -m BASE.gguf --lora adapter.gguf" in out
    assert [step.kind for step in provenance.read(here / "adapter.gguf")] == ["train", "export"]
