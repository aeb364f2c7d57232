"""Weights that stay on the disk: the same bytes in products, one layer in memory, what can go wrong."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.errors import ConfigError, ModelError
from fourbit.evaluate.generate import generate
from fourbit.memory.activations import checkpoint_activations
from fourbit.memory.mapped import MappedFile
from fourbit.memory.stream import hold_weights, stream_of
from fourbit.nn.linear import Linear4bit
from tests.tiny import byte_tokenizer, llama, save_llama

LAYERS = 5


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit checkpoint of five layers, whose packed weights span many pages, in several files."""
    folder = tmp_path_factory.mktemp("packed")
    llama(layers=LAYERS, hidden=768).to(torch.bfloat16).save_pretrained(str(folder / "plain"))
    byte_tokenizer().save_pretrained(str(folder / "plain"))
    fourbit.save_quantized(*fourbit.load(folder / "plain", compute_dtype="float32"), folder / "packed")
    return folder / "packed"


def load(path: Path) -> Any:
    model, _ = fourbit.load(path, compute_dtype="float32", weight_tier="disk")
    return model


def load_held(path: Path) -> Any:
    """The same bytes, without a mapping of their file."""
    model, _ = fourbit.load(path.parent / "plain", compute_dtype="float32")
    return model


def resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory through mappings of it."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and key == "Rss":
            total += 1024 * int(rest.split()[0])
    return total


def test_the_file_is_used_where_it_lies(packed: Path) -> None:
    held, mapped = load_held(packed), load(packed)
    assert (stream_of(held), stream_of(mapped) is not None) == (None, True)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(held(ids).logits, mapped(ids).logits)
    file = packed / "model.safetensors"
    if sys.platform == "linux":
        gc.collect()
        every = sum(p.nbytes for p in held.parameters() if p.dtype == torch.uint8)
        assert 0 < resident(file) < every / 2
        stream = stream_of(mapped)
        assert stream is not None
        stream.release(mapped.parameters())
        assert resident(file) < every / 8  # the header, and what the system maps beside what is touched
    before = {name: p.clone() for name, p in held.named_parameters()}
    assert all(torch.equal(before[name], p) for name, p in mapped.named_parameters())


def test_held_again(packed: Path) -> None:
    model = load(packed)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        hold_weights(model)
        gc.collect()
        assert stream_of(model) is None
        if sys.platform == "linux":
            assert resident(packed / "model.safetensors") == 0
        assert torch.equal(model(ids).logits, before)
    hold_weights(model)  # nothing to do


def test_generation_goes_round(packed: Path) -> None:
    held, mapped = load_held(packed), load(packed)
    prompts = [[5, 6, 7, 8], [9, 10]]
    assert generate(mapped, prompts, [2], 6) == generate(held, prompts, [2], 6)
    stream = stream_of(mapped)
    assert stream is not None
    assert stream._ahead.keys() == {0}  # after the last layer the first one


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["one function", "PEFT's own"])
def test_what_is_read_ahead(packed: Path, dropout: float) -> None:
    """Up in the forward pass, down while layers are recomputed, and again: no layer is read twice in vain."""
    model = fourbit.add_lora(load(packed), r=4, dropout=dropout)
    base, stream = model.get_base_model(), stream_of(model)
    assert stream is not None
    checkpoint_activations(base)
    model.train()
    read: list[int] = []
    original = stream._read
    stream._read = lambda number: (read.append(number), original(number))[1]  # type: ignore[func-returns-value,method-assign]
    for _ in range(2):
        model(torch.arange(3, 40)[None], use_cache=False).logits.sum().backward()
        stream._ahead[1].result()
    assert read == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0, 1]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_all_codes_and_scales_stay_there(tmp_path: Path, double_quant: bool, storage: torch.dtype) -> None:
    """Scales in fp32 as well, and codes that bitsandbytes stored as another type."""
    save_llama(tmp_path / "plain")
    held, tokenizer = fourbit.load(tmp_path / "plain", compute_dtype="float32", double_quant=double_quant)
    fourbit.save_quantized(held, tokenizer, tmp_path / "packed")  # type: ignore[arg-type]
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    packed = [name for name in tensors if f"{name}.absmax" in tensors]
    stored = {name: tensors[name].view(-1).view(storage).view(-1, 1) for name in packed}
    save_file({**{name: tensor.clone() for name, tensor in tensors.items()}, **stored}, file)
    model = load(tmp_path / "packed")
    stream = stream_of(model)
    assert stream is not None
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            assert stream._span(layer.weight) is not None, name
            assert stream._span(layer.weight_absmax) is not None, name
    expected = dict(held.named_parameters())
    assert all(torch.equal(expected[name], p) for name, p in model.named_parameters())


def test_only_packed_weights_and_only_with_recomputation(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only those of a 4-bit checkpoint"):
        load(packed.parent / "plain")
    with pytest.raises(ConfigError, match="weight_tier 'moon': must be device, host or disk"):
        fourbit.load(packed, weight_tier="moon")
    with pytest.raises(ConfigError, match="disk holds a layer or two at a time"):
        fourbit.train(
            fourbit.add_lora(load(packed), r=4),
            byte_tokenizer(),
            tmp_path / "rows.jsonl",
            output=tmp_path / "run",
            activation_checkpointing=False,
        )


def test_a_file_that_is_cut_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 64)
    file = MappedFile(path)
    assert file.tensor(256, 259).tolist() == [0, 1, 2]
    file.read(0, 256 * 64)
    with path.open("r+b") as handle:
        handle.truncate(100)
    with pytest.raises(ModelError, match=r"bytes: changed or damaged while in use .it ends at byte 100"):
        file.read(0, 256 * 64)
    with pytest.raises(ModelError, match="absent: cannot be mapped"):
        MappedFile(tmp_path / "absent")


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(8192))
    file = MappedFile(path)
    file.tensor(0, 100).fill_(7)
    assert path.read_bytes() == bytes(8192)
    assert file.span(torch.zeros(4)) is None
    span = file.span(file.tensor(5000, 6000))
    assert span is not None
    assert (span.begin, span.end) == (5000, 6000)
