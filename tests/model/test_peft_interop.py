"""Stock PEFT and fourbit read each other's adapters: the same logits in fp32, whichever side wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fourbit
from fourbit.model.adapters import load_adapter
from fourbit.nn.linear import Linear4bit
from fourbit.nn.lora import LoraLinear
from tests.tiny import save_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # PEFT's own, of lora_bias: layers here have no bias, and it takes the vector for half a matrix.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 14 LoRA tensor"),
]

ATOL = 1e-4
RANKS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2},
    "alpha_pattern": {"q_proj": 3, "up_proj": 40},
}
#: Settings of `peft.LoraConfig` beside r=4, lora_alpha=16 and target_modules="all-linear".
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": RANKS,
    "patterns_rslora": {**RANKS, "use_rslora": True},
    "dora": {"use_dora": True},
    "dora_patterns_rslora": {**RANKS, "use_dora": True, "use_rslora": True},
    "attention_only": {"target_modules": ["q_proj", "v_proj"]},
    "expression": {"target_modules": r".*layers\.1\..*_proj", **RANKS},
    "one_layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "excluded": {"exclude_modules": ["o_proj"]},
    "with_bias": {"lora_bias": True},
    "new_tokens": {"trainable_token_indices": {"embed_tokens": [5, 7, 11]}},
    "saved_norm": {"modules_to_save": ["norm"]},
    "saved_embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
}
#: fourbit puts LoRA on linear layers only; it reads these.
ONLY_THEIRS = {"embedding": {"target_modules": ["embed_tokens", "q_proj"]}}


def ids() -> Tensor:
    return torch.randint(3, 200, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=ids()).logits
    return result


def fill(model: nn.Module) -> None:
    """Everything that an adapter trains moves away from its initial value."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise.to(parameter.dtype)


def same_weights(packed: nn.Module, dense: nn.Module) -> nn.Module:
    """The dense model with what the packed one decodes to."""
    for name, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float32)
    return dense


class Bases:
    """One model folder, opened afresh: by fourbit in 4 bits or whole, by transformers with those weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def packed(self) -> nn.Module:
        return fourbit.load(self.folder, compute_dtype="float32")[0]

    def whole(self) -> nn.Module:
        return fourbit.load(self.folder, quant_type="none", compute_dtype="float32")[0]

    def stock(self, packed: bool) -> nn.Module:
        dense = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return same_weights(self.packed(), dense) if packed else dense

    def fourbit(self, packed: bool) -> nn.Module:
        return self.packed() if packed else self.whole()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(save_llama(tmp_path_factory.mktemp("base") / "model", dtype=torch.float32, tied=False))


def lora(options: dict[str, Any]) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **options}


def ours(base: nn.Module, options: dict[str, Any]) -> PeftModel:
    names = {"lora_alpha": "alpha", "use_rslora": "rslora"}
    settings = {names.get(name, name): value for name, value in lora(options).items()}
    return fourbit.add_lora(base, dropout=0.0, **settings)


def theirs(base: nn.Module, options: dict[str, Any]) -> PeftModel:
    return get_peft_model(base, LoraConfig(**lora(options), task_type="CAUSAL_LM"))


def save(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("case", CASES)
def test_stock_peft_reads_ours(bases: Bases, tmp_path: Path, case: str, packed: bool) -> None:
    model = ours(bases.fourbit(packed), CASES[case])
    fill(model)
    folder = save(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(bases.stock(packed), str(folder))
    assert not any(isinstance(module, LoraLinear) for module in stock.modules())
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=ATOL)
    assert (logits(stock) - logits(bases.stock(packed))).abs().max() > 100 * ATOL


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("case", CASES | ONLY_THEIRS)
def test_we_read_stock_peft_s(bases: Bases, tmp_path: Path, case: str, packed: bool) -> None:
    stock = theirs(bases.stock(packed), (CASES | ONLY_THEIRS)[case])
    assert any(type(module) is PeftLinear for module in stock.modules())
    fill(stock)
    folder = save(stock, tmp_path / "theirs")
    model = load_adapter(bases.fourbit(packed), folder)
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=ATOL)
    assert (logits(stock) - logits(bases.stock(packed))).abs().max() > 100 * ATOL
    # Read and written again, it is the same file: names, dtypes and values.
    again = load_file(save(model, tmp_path / "again") / "adapter_model.safetensors")
    first = load_file(folder / "adapter_model.safetensors")
    assert {name: tensor.dtype for name, tensor in again.items()} == {n: t.dtype for n, t in first.items()}
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_both_give_an_adapter_the_same_names(bases: Bases, tmp_path: Path) -> None:
    for case, options in CASES.items():
        mine = save(ours(bases.packed(), options), tmp_path / f"{case}-ours")
        stock = save(theirs(bases.stock(packed=False), options), tmp_path / f"{case}-theirs")
        tensors = [load_file(folder / "adapter_model.safetensors") for folder in (mine, stock)]
        shapes = [{name: tuple(tensor.shape) for name, tensor in found.items()} for found in tensors]
        assert shapes[0] == shapes[1], case


@pytest.mark.parametrize("case", ["saved_embedding", "plain"])
def test_tied_weights(tmp_path: Path, case: str) -> None:
    bases = Bases(save_llama(tmp_path / "model", dtype=torch.float32, tied=True))
    options = {"modules_to_save": ["embed_tokens"]} if case == "saved_embedding" else {}
    model = ours(bases.packed(), options)
    fill(model)
    folder = save(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(bases.stock(packed=True), str(folder))
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=ATOL)
    torch.testing.assert_close(logits(load_adapter(bases.packed(), folder)), logits(model), rtol=0, atol=ATOL)


@pytest.mark.parametrize("case", ["plain", "patterns_rslora", "dora", "saved_embedding"])
def test_stock_peft_on_bitsandbytes_reads_ours(bases: Bases, tmp_path: Path, case: str) -> None:
    model, tokenizer = fourbit.load(bases.folder, compute_dtype="float32")
    fourbit.save_quantized(model, tokenizer, tmp_path / "packed")
    adapted = ours(model, CASES[case])
    fill(adapted)
    folder = save(adapted, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, device_map={"": "cpu"}
    )
    stock = PeftModel.from_pretrained(base, str(folder))
    assert "peft.tuners.lora.bnb" in {type(module).__module__ for module in stock.modules()}
    # On an AVX-512 BF16 CPU bitsandbytes rounds its scales to bf16 when it first evaluates; where the input
    # of a training step wants a gradient it does not.
    embedded = stock.get_input_embeddings()(ids()).detach().requires_grad_()
    theirs_logits = stock.train()(inputs_embeds=embedded).logits.detach()
    torch.testing.assert_close(theirs_logits, logits(adapted), rtol=0, atol=ATOL)


def test_an_adapter_stored_in_16_bits(bases: Bases, tmp_path: Path) -> None:
    stock = theirs(bases.stock(packed=True), {})
    fill(stock)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    expected = logits(stock)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    folder = save(stock, tmp_path / "adapter")
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
    model = load_adapter(bases.packed(), folder)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ATOL)
