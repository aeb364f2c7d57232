"""GPT-2's Conv1D, whose weights are [in, out]: packed as [out, in], as bitsandbytes does, and turned back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import fourbit
from fourbit.model.adapters import load_adapter
from fourbit.model.base import open_base
from tests.exporting.adapters import load_with_peft, logits, save_adapter
from tests.tiny import byte_tokenizer

LAYER = "transformer.h.1.attn.c_proj"  # square: the wrong way round it would fit


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(byte_tokenizer()), "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids))
    with torch.no_grad():
        for parameter in model.parameters():  # GPT-2 starts with small weights, and equal ones in norms
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "source"))
    byte_tokenizer().save_pretrained(str(tmp_path / "source"))
    return tmp_path / "source"


def packed(path: Path) -> Any:
    return fourbit.load(path, compute_dtype="float32", device="cpu")[0].eval()


def test_the_same_bytes_as_bitsandbytes_both_ways(source: Path, tmp_path: Path) -> None:
    ours = packed(source)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(
            str(source), quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
        )
        theirs.save_pretrained(str(tmp_path / "theirs"))
    byte_tokenizer().save_pretrained(str(tmp_path / "theirs"))
    fourbit.save_quantized(ours, byte_tokenizer(), tmp_path / "ours")
    stored = {name: load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")}
    assert stored["ours"][f"{LAYER}.weight"].equal(stored["theirs"][f"{LAYER}.weight"])
    assert stored["ours"].keys() == stored["theirs"].keys()
    for name in ("ours", "theirs"):
        again = packed(tmp_path / name)
        # Its second-level scales may differ from ours in the last bit, its codes never.
        tolerance = {"rtol": 0.0, "atol": 0.0} if name == "ours" else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(logits(again), logits(ours), **tolerance)
        restored = open_base(tmp_path / name).tensors[f"{LAYER}.weight"].read()
        assert torch.equal(restored, again.get_submodule(LAYER).dequantize(torch.float32).t())


def test_it_computes_what_gpt2_does_on_the_restored_weights(source: Path) -> None:
    ours = packed(source)
    assert not [m for m in ours.modules() if isinstance(m, Conv1D)]
    plain = GPT2LMHeadModel.from_pretrained(str(source), dtype=torch.float32).eval()
    for name, module in plain.named_modules():
        if isinstance(module, Conv1D):
            module.weight.data = ours.get_submodule(name).dequantize(torch.float32).t().contiguous()
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_adapters_of_stock_peft_and_the_merges(source: Path, tmp_path: Path, options: dict) -> None:
    adapter = save_adapter(
        GPT2LMHeadModel.from_pretrained(str(source), dtype=torch.float32),
        tmp_path / "adapter",
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        **options,
    )
    adapted = load_adapter(packed(source), adapter).eval()
    wanted = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert isinstance(merged.get_submodule(LAYER), Conv1D)
    fourbit.save_quantized(packed(source), byte_tokenizer(), tmp_path / "packed")
    fourbit.merge(tmp_path / "packed", tmp_path / "merged", adapter=adapter, dtype="float32")
    again = GPT2LMHeadModel.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)
    fourbit.export(tmp_path / "packed", tmp_path / "again", to="bnb", adapter=adapter)
    requantized = open_base(tmp_path / "again").tensors[f"{LAYER}.weight"].read()
    weight = again.get_submodule(LAYER).weight
    assert (requantized - weight).norm() < 0.11 * weight.norm()


def test_an_adapter_trained_here_on_stock_gpt2(source: Path, tmp_path: Path) -> None:
    model = fourbit.add_lora(packed(source), r=4, target_modules="attention", dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    assert {n.split(".h.1.")[1] for n in model.targeted_module_names if ".h.1." in n} == {
        "attn.c_attn",
        "attn.c_proj",
    }
    model.save_pretrained(str(tmp_path / "adapter"))
    stock = load_with_peft(source, tmp_path / "adapter")
    with torch.no_grad():
        for name, module in stock.base_model.model.named_modules():
            ours = model.base_model.model.get_submodule(name)
            if isinstance(getattr(module, "base_layer", module), Conv1D) and not hasattr(module, "lora_A"):
                base = module
                layer = getattr(ours, "base_layer", ours)
                base.weight.copy_(layer.dequantize(torch.float32).t())
    torch.testing.assert_close(logits(stock), logits(model.eval()), rtol=1e-4, atol=1e-4)
