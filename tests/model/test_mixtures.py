"""Mixtures of experts: loading in 4 bits, adapters in PEFT's layout, checkpoints, training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fourbit
from fourbit.config_file import resolve
from fourbit.errors import ConfigError, ModelError
from fourbit.memory.stream import stream_of
from fourbit.memory.weights import count_weights
from fourbit.model.adapters import load_adapter
from fourbit.model.quantizer import FourBitConfig
from fourbit.nn.experts import Experts4bit
from fourbit.nn.lora_experts import LoraExperts
from fourbit.nn.packed import packed_parts
from fourbit.training.run import run
from fourbit.training.skeleton import run_skeleton
from tests.model.test_architectures import IDS, load, logits, save
from tests.tiny import byte_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # stock PEFT's
    # Which looks for patterns of ranks among modules alone.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def restored(folder: Path) -> Any:
    """The plain model with the weights that the packed one computes with."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for part in packed_parts(load(folder)):
        owner, _, leaf = part.name.rpartition(".")
        module: Any = part.module
        values = module.dequantize(leaf) if isinstance(module, Experts4bit) else module.dequantize()
        plain.get_submodule(owner).get_parameter(leaf).data.copy_(values)
    return plain


def adapted(model: Any, **options: Any) -> Any:
    """With an adapter that changes something."""
    model = fourbit.add_lora(model, r=3, alpha=6, dropout=0.0, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def same_bytes(one: Any, other: Any) -> bool:
    pairs = zip(packed_parts(one), packed_parts(other), strict=True)
    return all(
        a.name == b.name and all(map(torch.equal, (a.codes, *a.scales), (b.codes, *b.scales)))
        for a, b in pairs
    )


def test_experts_are_packed_and_compute_what_they_are_restored_to(folder: Path) -> None:
    model = load(folder)
    assert "16 matrices of experts in nf4" in model.fourbit_report.line()
    assert model.fourbit_report.left == ("lm_head",)
    torch.testing.assert_close(logits(model), logits(restored(folder)), rtol=1e-5, atol=1e-5)
    assert model.fourbit_report.parameters == sum(p.numel() for p in restored(folder).parameters())


def test_transformers_packs_them_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FourBitConfig(compute_dtype=torch.float32)
    )
    assert same_bytes(model, load(folder))
    model.save_pretrained(str(tmp_path / "saved"))
    byte_tokenizer().save_pretrained(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same_bytes(again, model)
    assert torch.equal(logits(again), logits(model))
    assert same_bytes(load(tmp_path / "saved"), model)


def test_stock_peft_computes_the_same_with_an_adapter(folder: Path, tmp_path: Path) -> None:
    model = adapted(load(folder))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    stock = PeftModel.from_pretrained(restored(folder), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(folder)))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(stock), rtol=1e-5, atol=1e-5)
    assert not any(True for _ in packed_parts(merged))


def test_gradients_are_stock_pefts(folder: Path, tmp_path: Path) -> None:
    model = adapted(load(folder))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    stock = PeftModel.from_pretrained(restored(folder), str(tmp_path / "adapter"), is_trainable=True)
    for one in (model, stock):
        one(IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)


def test_an_adapter_of_stock_peft_loads(folder: Path, tmp_path: Path) -> None:
    stock = get_peft_model(
        restored(folder),
        LoraConfig(
            r=3,
            target_modules=["q_proj"],
            target_parameters=["experts.down_proj", "experts.gate_up_proj"],
            use_rslora=True,
            rank_pattern={"experts.down_proj": 2},
            init_lora_weights=False,
        ),
    )
    stock.save_pretrained(str(tmp_path / "adapter"))
    found = load_adapter(load(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(stock), rtol=1e-5, atol=1e-5)


def test_peft_asked_for_all_linear_layers(mixtral: Path) -> None:
    """Which for this family are the router too, and twice the rank for gate and up, by PEFT's own rule."""
    model = get_peft_model(load(mixtral), LoraConfig(r=3, target_modules="all-linear"))
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    assert isinstance(experts, LoraExperts)
    assert isinstance(experts.base_layer, LoraExperts)
    assert experts.base_layer.lora_A["default"].weight.shape == (4 * 6, 64)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_adapter_on_a_mixture_in_16_bits_is_stock_pefts(mixtral: Path, tmp_path: Path) -> None:
    whole = fourbit.load(mixtral, quant_type="none", compute_dtype="float32", device="cpu")[0]
    model = adapted(whole)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    plain = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    stock = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, LoraExperts) for module in model.modules())


@pytest.mark.parametrize(
    ("targets", "wrappers"),
    [("all-linear", 2), ("attention", 0), (["q_proj", "down_proj"], 1), ("experts.gate_up_proj", 1)],
)
def test_what_gets_an_adapter(mixtral: Path, targets: Any, wrappers: int) -> None:
    model = fourbit.add_lora(load(mixtral), r=2, dropout=0.0, target_modules=targets)
    found = [module for module in model.modules() if isinstance(module, LoraExperts)]
    assert len(found) == 2 * wrappers
    assert not any("gate.weight" in name for name, p in model.named_parameters() if p.requires_grad)
    model(IDS, labels=IDS).loss.backward()


def test_experts_have_no_dropout(mixtral: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.dropout = 0\.05: PEFT has no dropout for experts"):
        fourbit.add_lora(load(mixtral))
    fourbit.add_lora(load(mixtral), target_modules="attention")


def test_variants_that_peft_lacks_for_experts_are_one_line(mixtral: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not work with use_dora=True"):
        fourbit.add_lora(load(mixtral), dropout=0.0, use_dora=True)


def test_an_adapter_cannot_be_merged_in_place(mixtral: Path) -> None:
    model = adapted(load(mixtral))
    with pytest.raises(ModelError, match="cannot be merged into 4-bit weights in place"):
        model.merge_adapter()


def test_two_adapters_side_by_side(mixtral: Path, tmp_path: Path) -> None:
    adapted(load(mixtral), seed=1).save_pretrained(str(tmp_path / "one"), save_embedding_layers=False)
    adapted(load(mixtral), seed=2).save_pretrained(str(tmp_path / "two"), save_embedding_layers=False)
    both = load_adapter(load_adapter(load(mixtral), tmp_path / "one"), tmp_path / "two", name="two")
    for name, adapter in (("default", "one"), ("two", "two")):
        both.set_adapter(name)
        alone = load_adapter(load(mixtral), tmp_path / adapter)
        assert torch.equal(logits(both), logits(alone))


def pack(folder: Path, target: Path) -> Path:
    fourbit.save_quantized(load(folder), byte_tokenizer(), target)
    return target


def test_a_checkpoint_holds_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fourbit"
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert same_bytes(load(packed), load(folder))
    assert torch.equal(logits(load(packed)), logits(load(folder)))
    byte_by_byte = load_file(packed / "model.safetensors")
    for part in packed_parts(load(folder)):
        assert torch.equal(byte_by_byte[part.name].view(-1), part.codes.view(-1))


def test_int4_is_saved_by_transformers_and_read_here(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "llama")
    config = FourBitConfig("int4", compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(str(tmp_path / "saved"))
    byte_tokenizer().save_pretrained(str(tmp_path / "saved"))
    assert same_bytes(load(tmp_path / "saved"), model)
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


NAME = "model.layers.1.mlp.experts.gate_up_proj"


def damage(packed: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(packed / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[NAME + name.removeprefix("x")]
        else:
            tensors[NAME + name.removeprefix("x")] = tensor
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})


def test_a_damaged_checkpoint_is_one_line(mixtral: Path, tmp_path: Path) -> None:
    for number, (part, tensor, expected) in enumerate(
        [
            ("x_absmax", None, f"'{NAME}_absmax' is missing; is the checkpoint complete"),
            ("x", torch.zeros(4, 7, dtype=torch.uint8), f"'{NAME}' has shape .*4, 7.* the config says"),
            ("x_consts", torch.zeros(4, 8), f"'{NAME}_consts' has shape .* of torch.float32"),
        ]
    ):
        packed = pack(mixtral, tmp_path / f"packed{number}")
        damage(packed, **{part: tensor})
        with pytest.raises(ModelError, match=expected):
            load(packed)
    packed = pack(mixtral, tmp_path / "infinite")
    whole = load_file(packed / "model.safetensors")[f"{NAME}_consts"]
    whole[2, :4] = torch.tensor([float("inf")]).view(torch.uint8)
    damage(packed, x_consts=whole)
    with pytest.raises(ModelError, match=f"nested_absmax of '{NAME}' has inf"):
        load(packed)


@pytest.mark.parametrize(
    "change",
    [{"quant_type": "nf5"}, {"block_size": 65}, {"double_quant": 1}, {"modules_to_not_convert": None}],
)
def test_malformed_settings_are_one_line(change: dict[str, Any], mixtral: Path, tmp_path: Path) -> None:
    packed = pack(mixtral, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= change
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"the quantization_config in config\.json is malformed"):
        load(packed)


@pytest.mark.parametrize("missing", ["experts.2.w3.weight", "experts.3.w2.weight"])
def test_a_missing_expert_is_one_line(missing: str, mixtral: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    del tensors[f"model.layers.1.block_sparse_moe.{missing}"]
    save_file(tensors, mixtral / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"mlp\.experts\..* needs the matrices of 4 experts, .*3 are there"):
        load(mixtral)


def test_weights_that_are_not_finite_are_one_line(mixtral: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][5, 7] = float("nan")
    save_file(tensors, mixtral / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj.* nan at \[5, 7\]"):
        load(mixtral)


def settings(model: Path, folder: Path, output: str, **given: Any) -> Any:
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"say {n}", "completion": str(n)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return resolve(
        {
            "model": {"path": str(model), "compute_dtype": "float32", "device": "cpu", **given},
            "lora": {"r": 4, "dropout": 0},
            "data": {"train": str(data), "heldout_fraction": 0.2, "max_length": 64},
            "train": {"effective_batch": 4, "micro_batch": 2, "max_steps": 4, "eval_every": 2},
            "output": str(folder / output),
        }
    )


@pytest.mark.parametrize("packed", [False, True])
def test_the_plan_counts_the_bytes_of_the_loaded_model(packed: bool, folder: Path, tmp_path: Path) -> None:
    source = pack(folder, tmp_path / "packed") if packed else folder
    model = fourbit.add_lora(load(source), r=4, dropout=0.0)
    planned = count_weights(run_skeleton(settings(source, tmp_path, "run"), torch.float32))
    assert planned == count_weights(model)
    assert planned.codes + planned.scales + planned.rest + planned.trained == sum(
        p.nbytes for p in model.parameters()
    )


def test_training_runs_and_weights_may_stay_on_the_disk(mixtral: Path, tmp_path: Path) -> None:
    packed = pack(mixtral, tmp_path / "packed")
    console = Console(file=io.StringIO())
    held = run(settings(packed, tmp_path, "held"), console, predict=True)
    mapped = run(settings(packed, tmp_path, "mapped", weight_tier="disk"), console)
    adapters = [load_file(r.adapter / "adapter_model.safetensors") for r in (held, mapped)]
    assert adapters[0].keys() == adapters[1].keys()
    assert any("experts.base_layer.lora_A" in name for name in adapters[0])
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert held.metrics["predicted_peak_bytes"] > 0
    model = fourbit.load(packed, compute_dtype="float32", device="cpu", weight_tier="disk")[0]
    assert stream_of(model) is not None
    assert torch.equal(logits(model), logits(load(packed)))
