"""In stock pipelines: transformers quantizes, saves, generates and trains, PEFT adapts and merges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

import fourbit
from fourbit.errors import ConfigError, ModelError
from fourbit.nn.linear import Linear4bit
from fourbit.nn.lora import LoraLinear
from tests.integrations.conftest import losses_of_our_loss, quantized
from tests.tiny import byte_tokenizer, llama

IDS = torch.arange(3, 40)[None]
# What PEFT and transformers have to say of each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(("tied", "skipped"), [(True, None), (False, ["down_proj"])])
def test_save_pretrained_writes_what_bitsandbytes_reads(
    tmp_path: Path, tied: bool, skipped: list[str] | None
) -> None:
    """A process that knows nothing of fourbit loads the same bytes; so does fourbit."""
    plain = llama(hidden=128, tied=tied)
    plain.save_pretrained(str(tmp_path / "plain"))
    byte_tokenizer().save_pretrained(str(tmp_path / "plain"))
    model = quantized(tmp_path / "plain", modules_to_not_convert=skipped)
    model.save_pretrained(str(tmp_path / "saved"))
    byte_tokenizer().save_pretrained(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert ("lm_head.weight" in load_file(tmp_path / "saved" / "model.safetensors")) != tied
    script = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert "fourbit" not in sys.modules
packed = {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
found = {n: m.weight.data.view(-1).clone() for n, m in packed.items()}
model.train()  # without it bitsandbytes multiplies in bf16 where the processor can, whatever the dtype
with torch.no_grad():
    found["logits"] = model(torch.arange(3, 40)[None]).logits
save_file(found, sys.argv[2])
"""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        script,
        str(tmp_path / "saved"),
        str(tmp_path / "theirs"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "theirs")
    wanted = logits(model)
    torch.testing.assert_close(theirs.pop("logits"), wanted, rtol=1e-4, atol=1e-4)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert layers.keys() == theirs.keys()
    assert any("down_proj" in name for name in layers) == (skipped is None)
    assert all(torch.equal(layers[name].weight, theirs[name]) for name in layers)
    ours, _ = fourbit.load(tmp_path / "saved", compute_dtype="float32", device="cpu")
    assert torch.equal(logits(ours), wanted)


@pytest.mark.parametrize("double", [False, True])
def test_a_configuration_of_bitsandbytes_gives_its_bytes(folder: Path, double: bool) -> None:
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    wanted = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q_proj", "lm_head"], **settings)
    ours = AutoModelForCausalLM.from_pretrained(
        str(folder), quantization_config=fourbit.FourBitConfig.of(wanted), dtype=torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        str(folder), quantization_config=wanted, dtype=torch.float32
    )
    layers = {name: m for name, m in ours.named_modules() if isinstance(m, Linear4bit)}
    packed = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    assert layers.keys() == packed.keys()
    assert not any("q_proj" in name for name in layers)
    assert all(torch.equal(layers[name].weight, packed[name].weight.view(-1)) for name in layers)
    with pytest.raises(ConfigError, match="only load_in_4bit=True has a counterpart"):
        fourbit.FourBitConfig.of(BitsAndBytesConfig(load_in_8bit=True))


def test_int4_stays_ours(folder: Path, tmp_path: Path) -> None:
    """bitsandbytes has no such type: the checkpoint says fourbit, and loads where that is imported."""
    model = quantized(folder, quant_type="int4")
    model.save_pretrained(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_type"]) == ("fourbit", "int4")
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_generate_and_pipeline(folder: Path) -> None:
    model, held = quantized(folder), fourbit.load(folder, compute_dtype="float32", device="cpu")[0]
    wanted = held.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), wanted)
    said = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())("hello", max_new_tokens=3)
    assert said[0]["generated_text"].startswith("hello")


def stock_lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize("loaded", ["from_pretrained", "fourbit.load"])
def test_stock_peft_gets_our_layers_and_merges_to_floats(folder: Path, loaded: str, tmp_path: Path) -> None:
    def base() -> Any:
        if loaded == "fourbit.load":
            return fourbit.load(folder, compute_dtype="float32", device="cpu")[0]
        return quantized(folder)

    torch.manual_seed(0)
    model = get_peft_model(base(), stock_lora(init_lora_weights=False))
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(adapted) == 14
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    again = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ModelError, match="cannot be merged into 4-bit weights in place"):
        model.merge_adapter()
    merged = again.merge_and_unload()
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_adapters_combine_as_peft_combines_them(folder: Path, kind: str) -> None:
    """These two are exact: with ranks enough the sum of what the adapters add, each with its weight."""
    model = get_peft_model(quantized(folder), stock_lora(init_lora_weights=False), "one")
    model.add_adapter("two", stock_lora(init_lora_weights=False))
    more = {"svd_rank": 8} if kind == "svd" else {}
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type=kind, **more)
    for layer in (module for module in model.modules() if isinstance(module, LoraLinear)):
        wanted = 0.7 * layer.get_delta_weight("one") + 0.3 * layer.get_delta_weight("two")
        torch.testing.assert_close(layer.get_delta_weight("both"), wanted, rtol=1e-4, atol=1e-5)
    alone = logits(model)
    model.set_adapter("both")
    assert not torch.allclose(logits(model), alone)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva"])
def test_initialisations_of_peft(folder: Path, start: Any) -> None:
    """What changes only the adapter: its layers are ours, its weights fp32, and the model is the base's."""
    base = quantized(folder)
    before = logits(base)
    model = get_peft_model(base, stock_lora(init_lora_weights=start))
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    assert {p.dtype for p in weights} == {torch.float32}
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 14
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    model(IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in weights)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "mica", "loftq", "lora_ga"])
def test_initialisations_that_would_change_packed_weights_are_refused(folder: Path, start: str) -> None:
    more = {"loftq_config": LoftQConfig()} if start == "loftq" else {}
    with pytest.raises(ModelError, match=rf"^init_lora_weights='{start}' .*which are in 4 bits here; take"):
        get_peft_model(quantized(folder), stock_lora(init_lora_weights=start, **more))
    if start in ("pissa", "olora"):  # plain layers are PEFT's affair
        plain = llama()
        wanted = logits(plain)
        model = fourbit.add_lora(plain, r=4, dropout=0.0)
        model.add_adapter("other", stock_lora(init_lora_weights=start))
        model.set_adapter("other")
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_plain_layers_stay_peft_s_own() -> None:
    fourbit.FourBitConfig()
    model = get_peft_model(llama(), stock_lora())
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert any(isinstance(module, nn.Linear) for module in model.modules())


def test_the_stock_trainer_learns_what_our_loop_does(folder: Path, tmp_path: Path) -> None:
    """The same batches of its collator: the same losses."""
    tokenizer = byte_tokenizer()
    rows = [{"input_ids": list(range(3, 20 + n % 3))} for n in range(6)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    model = get_peft_model(quantized(folder), stock_lora())
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.manual_seed(0)
    model = get_peft_model(quantized(folder), stock_lora())
    ours = losses_of_our_loss(model, [collator(rows[start : start + 2]) for start in (0, 2, 4)])
    # The trainer logs four digits.
    assert [float(loss) for loss in theirs] == pytest.approx(ours, rel=1.5e-4)
