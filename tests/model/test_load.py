from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fourbit
from fourbit import functional as F4
from fourbit.errors import ConfigError, ModelError
from fourbit.nn.linear import Linear4bit
from tests.tiny import byte_tokenizer, llama, save_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "model")


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {
        name: parameter.detach().cpu().view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
    }


def rounded() -> torch.nn.Module:
    """The tiny model with bf16-rounded weights in fp32; buffers keep their precision."""
    model = llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 33).view(2, 15)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_weight_is_quantized_from_its_stored_precision(
    tmp_path: Path, dtype: torch.dtype, shards: bool
) -> None:
    source = save_llama(tmp_path / "model", dtype, shards)
    original = llama().to(dtype)
    model, _ = fourbit.load(source, compute_dtype="float32")
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            expected = F4.quantize_4bit(original.get_submodule(name).weight, double_quant=True)
            assert torch.equal(module.weight, expected.codes)
            assert torch.equal(module.weight_absmax, expected.absmax)
    assert model.fourbit_report.converted == 14
    assert model.fourbit_report.left == ("lm_head",)


def test_the_bytes_do_not_depend_on_the_compute_dtype(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model", torch.float32)
    packed = []
    for compute in ("float32", "bfloat16"):
        model, _ = fourbit.load(source, compute_dtype=compute)
        layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
        packed.append([m.weight.numpy().tobytes() for m in layers])
    assert packed[0] == packed[1]


def test_what_is_not_linear_stays_in_16_bits_and_ties_hold(folder: Path) -> None:
    model, tokenizer = fourbit.load(folder, compute_dtype="bfloat16")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert tokenizer.pad_token == "<|pad|>"


def test_an_untied_head_stays_in_16_bits(tmp_path: Path) -> None:
    model, _ = fourbit.load(save_llama(tmp_path / "model", tied=False), compute_dtype="bfloat16")
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_the_forward_equals_the_dequantized_model(folder: Path) -> None:
    model, _ = fourbit.load(folder, compute_dtype="float32")
    dense = rounded()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float32)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-6)


def test_quant_type_none_gives_the_model_itself(folder: Path) -> None:
    model, _ = fourbit.load(folder, quant_type="none", compute_dtype="float32")
    assert torch.equal(logits(model), logits(rounded()))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_saved_checkpoint_comes_back_byte_for_byte(
    tmp_path: Path, folder: Path, quant_type: str, double_quant: bool
) -> None:
    model, tokenizer = fourbit.load(
        folder, quant_type=quant_type, double_quant=double_quant, compute_dtype="bfloat16"
    )
    fourbit.save_quantized(model, tokenizer, tmp_path / "saved")
    again, _ = fourbit.load(tmp_path / "saved", compute_dtype="bfloat16")
    assert bytes_of(again) == bytes_of(model)
    assert torch.equal(logits(again), logits(model))
    assert again.fourbit_report.quant_type == quant_type


def test_int4_loads_but_is_refused_on_save(tmp_path: Path, folder: Path) -> None:
    model, tokenizer = fourbit.load(folder, quant_type="int4", compute_dtype="float32")
    assert logits(model).isfinite().all()
    with pytest.raises(
        ModelError, match="int4 cannot be saved: a bitsandbytes checkpoint holds nf4 or fp4 only"
    ):
        fourbit.save_quantized(model, tokenizer, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_bits_per_weight_are_counted_from_saved_bytes(tmp_path: Path) -> None:
    big = llama(hidden=512, layers=1).to(torch.bfloat16)
    big.save_pretrained(str(tmp_path / "big"))
    byte_tokenizer().save_pretrained(str(tmp_path / "big"))
    model, tokenizer = fourbit.load(tmp_path / "big", compute_dtype="bfloat16")
    fourbit.save_quantized(model, tokenizer, tmp_path / "saved")
    saved = load_file(str(tmp_path / "saved" / "model.safetensors"))
    parts = (".weight", ".absmax", ".nested_absmax")
    packed = {k: v for k, v in saved.items() if "_proj" in k and k.endswith(parts)}
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit))
    assert 8 * sum(v.nbytes for v in packed.values()) / weights == pytest.approx(4.127, abs=5e-4)
    assert model.fourbit_report.bits_per_weight == pytest.approx(4.127, abs=1e-3)


def test_a_missing_tensor_is_an_error_not_a_random_weight(folder: Path) -> None:
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    tensors = load_file(str(file))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model.layers.1.mlp.up_proj.weight.*incomplete"):
        fourbit.load(folder, compute_dtype="float32")


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged"):
        fourbit.load(folder)


def test_a_weight_that_is_not_finite_is_named(folder: Path) -> None:
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    tensors = load_file(str(file))
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 5] = float("nan")
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(fourbit.errors.FourBitError, match=r"layers\.0\.self_attn\.q_proj\.weight.*\[3, 5\]"):
        fourbit.load(folder, compute_dtype="float32")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights .* never loaded"):
        fourbit.load(folder)


def test_an_index_cannot_lead_out_of_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside the model folder"):
        fourbit.load(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "no such model folder"),
        ("nowhere.gguf", "no such model folder"),
        ("someone/some-model", "the hub cannot be reached"),
    ],
)
def test_a_model_that_is_not_there(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fourbit.load(path)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json here"):
        fourbit.load(tmp_path)


def test_float16_on_a_cpu_is_refused_with_the_reason(folder: Path) -> None:
    with pytest.raises(ConfigError, match="15 to 200 times slower"):
        fourbit.load(folder, compute_dtype="float16", device="cpu")


def test_a_tokenizer_without_a_pad_token_gets_one(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(str(folder))
    _, loaded = fourbit.load(folder, compute_dtype="float32")
    assert loaded.pad_token == "<|pad|>"


def test_tokens_the_model_has_no_row_for_get_the_mean_row(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", torch.float32)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(str(folder))
    model, loaded = fourbit.load(folder, compute_dtype="float32")
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == len(loaded)
    torch.testing.assert_close(rows[-1], rows[:-1].mean(dim=0))
    assert model.lm_head.weight is rows


def test_transformers_loads_with_our_config(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), quantization_config=fourbit.FourBitConfig(), dtype=torch.float32
    )
    ours, _ = fourbit.load(folder, compute_dtype="float32")
    assert torch.equal(logits(model), logits(ours))
