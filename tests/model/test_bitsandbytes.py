"""Checkpoints cross between bitsandbytes (through transformers) and fourbit with every byte unchanged."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import fourbit
from tests.tiny import byte_tokenizer, llama, save_llama

SCHEMES = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


def stock(path: Path, **options: object) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.bfloat16, device_map={"": "cpu"}, **options
        )


def stock_quantized(path: Path, quant_type: str, double_quant: bool) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return stock(path, quantization_config=config)


def fp32_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits in fp32 on the unpacked path.

    bitsandbytes repacks its weights on the first evaluation forward on an AVX-512 BF16 CPU, with scales
    rounded to bf16; in training mode with an input that wants a gradient it does not.
    """
    model.train()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    embedded = model.get_input_embeddings()(torch.arange(3, 33).view(2, 15)).detach().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(inputs_embeds=embedded).logits.detach()


@pytest.mark.parametrize(("quant_type", "double_quant"), SCHEMES)
def test_a_checkpoint_made_by_bitsandbytes_loads_with_equal_bytes(
    tmp_path: Path, quant_type: str, double_quant: bool
) -> None:
    source = save_llama(tmp_path / "source")
    theirs = stock_quantized(source, quant_type, double_quant)
    theirs.save_pretrained(str(tmp_path / "bnb"))
    byte_tokenizer().save_pretrained(str(tmp_path / "bnb"))
    ours, tokenizer = fourbit.load(tmp_path / "bnb", compute_dtype="bfloat16")
    assert ours.fourbit_report.converted == 14
    fourbit.save_quantized(ours, tokenizer, tmp_path / "back")
    first = load_file(str(tmp_path / "bnb" / "model.safetensors"))
    second = load_file(str(tmp_path / "back" / "model.safetensors"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    torch.testing.assert_close(fp32_logits(ours), fp32_logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("quant_type", "double_quant"), SCHEMES)
def test_what_fourbit_saves_loads_in_bitsandbytes(
    tmp_path: Path, quant_type: str, double_quant: bool
) -> None:
    source = save_llama(tmp_path / "source")
    ours, tokenizer = fourbit.load(
        source, quant_type=quant_type, double_quant=double_quant, compute_dtype="bfloat16"
    )
    fourbit.save_quantized(ours, tokenizer, tmp_path / "saved")
    theirs = stock(tmp_path / "saved")
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    torch.testing.assert_close(fp32_logits(ours), fp32_logits(theirs), rtol=1e-5, atol=1e-6)


def test_a_block_size_of_128_crosses_too(tmp_path: Path) -> None:
    # 128 columns: where a block straddles rows, bitsandbytes' AVX-512 code reads the wrong scale.
    llama(hidden=128).to(torch.bfloat16).save_pretrained(str(tmp_path / "source"))
    byte_tokenizer().save_pretrained(str(tmp_path / "source"))
    ours, tokenizer = fourbit.load(tmp_path / "source", block_size=128, compute_dtype="bfloat16")
    fourbit.save_quantized(ours, tokenizer, tmp_path / "saved")
    torch.testing.assert_close(
        fp32_logits(ours), fp32_logits(stock(tmp_path / "saved")), rtol=1e-5, atol=1e-6
    )


def test_packed_bytes_stored_as_bfloat16_are_the_same_bytes(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    )
    stock(source, quantization_config=config).save_pretrained(str(tmp_path / "bnb"))
    byte_tokenizer().save_pretrained(str(tmp_path / "bnb"))
    ours, _ = fourbit.load(tmp_path / "bnb", compute_dtype="float32")
    plain, _ = fourbit.load(source, double_quant=False, compute_dtype="float32")
    assert torch.equal(ours.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
