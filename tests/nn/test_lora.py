from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear

import fourbit
from fourbit.errors import ConfigError, ModelError
from fourbit.memory.activations import checkpoint_activations
from fourbit.model.adapters import key_source, load_adapter, parameter_counts
from fourbit.nn.fused import fuse
from fourbit.nn.linear import Linear4bit
from fourbit.nn.lora import LoraLinear
from tests.tiny import save_llama


@pytest.fixture
def base(tmp_path: Path) -> torch.nn.Module:
    return fourbit.load(save_llama(tmp_path / "model"), compute_dtype="float32")[0]


def ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 200, (rows, length))


def fill_b(model: torch.nn.Module, seed: int = 2) -> None:
    """Give B values, so that the adapter does something."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)


def dense_layer(layer: LoraLinear, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = layer.get_base_layer().dequantize(torch.float32).to(dtype)
    return weight, layer.lora_A["default"].weight.to(dtype), layer.lora_B["default"].weight.to(dtype)


@pytest.mark.parametrize("length", [2, 30], ids=["few rows", "many rows"])
def test_with_b_zero_the_logits_are_the_bases(base: torch.nn.Module, length: int) -> None:
    tokens = ids(length=length)
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        after = fourbit.add_lora(base).eval()(input_ids=tokens).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("length", [2, 30], ids=["few rows", "many rows"])
def test_without_gradients_the_same(base: torch.nn.Module, length: int) -> None:
    model, tokens = fourbit.add_lora(base).eval(), ids(length=length)
    fill_b(model)
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
    assert torch.equal(plain, model(input_ids=tokens).logits)


def test_hooks_on_the_base_are_called(base: torch.nn.Module) -> None:
    model, called = fourbit.add_lora(base), []
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    layer.get_base_layer().register_forward_pre_hook(lambda *_: called.append(1))
    model(input_ids=ids(length=30)).logits.sum().backward()
    assert called == [1]


def test_adapters_in_16_bits(base: torch.nn.Module) -> None:
    model, tokens = fourbit.add_lora(base, dropout=0.0), ids(length=30)
    fill_b(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model(input_ids=tokens).logits.sum().backward()
    halves = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data, parameter.grad = parameter.data.float(), None
    model(input_ids=tokens).logits.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert halves[name].dtype == torch.bfloat16
            assert (halves[name].float() - parameter.grad).norm() <= 2**-8 * parameter.grad.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("in_features", [64, 70])
def test_gradients_against_fp64(in_features: int, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = Linear4bit.from_linear(torch.nn.Linear(in_features, 48, bias=bias).requires_grad_(False))
    layer = LoraLinear(linear, "default", LoraConfig(r=4), r=4, lora_alpha=8)
    fill_b(layer)
    x = torch.randn(rows, in_features, requires_grad=True)
    grad = torch.randn(rows, 48)
    y = layer(x)
    y.backward(grad)

    exact = x.detach().double().requires_grad_()
    weight, a, b = (part.detach().requires_grad_() for part in dense_layer(layer, torch.float64))
    truth = exact @ weight.T + 2.0 * (exact @ a.T) @ b.T
    if bias:
        truth = truth + linear.bias.double()
    truth.backward(grad.double())
    pairs = {
        "y": (y, truth),
        "x": (x.grad, exact.grad),
        "A": (layer.lora_A["default"].weight.grad, a.grad),
        "B": (layer.lora_B["default"].weight.grad, b.grad),
    }
    for name, (ours, true) in pairs.items():
        error = (ours.detach().double() - true.detach()).norm() / true.detach().norm()
        assert error < 1e-5, f"{name}: {error:.2e}"


def test_the_fused_forward_is_peft_s_own(base: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fourbit.add_lora(base, dropout=0.0, rslora=True)
    fill_b(model)
    fused = model(input_ids=ids())
    fused.logits.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(LoraLinear, "_fused_adapter", lambda *_: None)
    plain = model(input_ids=ids())
    plain.logits.sum().backward()
    torch.testing.assert_close(fused.logits, plain.logits, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 5e-6, f"{name}: {error:.2e}"  # twice what two orders of summation make


def test_every_adapter_gets_a_gradient_and_the_base_none(base: torch.nn.Module) -> None:
    model = fourbit.add_lora(base)
    fill_b(model)
    model(input_ids=ids()).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def dropped_logits(model: PeftModel, tokens: torch.Tensor, rows: list[int], step: int = 3) -> torch.Tensor:
    source = key_source(model)
    assert source is not None
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    source.set(7, step, torch.tensor(rows), positions)
    return model(input_ids=tokens).logits.detach()


def test_dropout_does_not_depend_on_the_micro_batch(base: torch.nn.Module) -> None:
    model = fourbit.add_lora(base, dropout=0.3).train()
    fill_b(model)
    tokens = ids(rows=4)
    together = dropped_logits(model, tokens, [10, 11, 12, 13])
    swapped = dropped_logits(model, tokens[[2, 0]], [12, 10])
    torch.testing.assert_close(together[[2, 0]], swapped, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, dropped_logits(model, tokens, [10, 11, 12, 13], step=4), atol=1e-3)
    assert not torch.allclose(together, dropped_logits(model, tokens, [20, 11, 12, 13]), atol=1e-3)


def test_dropout_is_recomputed_alike_under_checkpointing(base: torch.nn.Module) -> None:
    model = fourbit.add_lora(base, dropout=0.3).train()
    fill_b(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model.get_base_model())
        model.zero_grad()
        source = key_source(model)
        source.set(7, 0, torch.tensor([0, 1]), torch.arange(9).expand(2, 9))
        model(input_ids=ids()).logits.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


def test_masked_gradients_against_fp64() -> None:
    torch.manual_seed(0)
    linear = Linear4bit.from_linear(torch.nn.Linear(64, 48, bias=False).requires_grad_(False))
    layer = LoraLinear(linear, "default", LoraConfig(r=4, lora_dropout=0.25), r=4, lora_alpha=8).train()
    fill_b(layer)
    layer.key_source = fourbit.nn.dropout.KeySource()
    layer.key_source.set(1, 2, torch.tensor([5]), torch.arange(40)[None])
    x = torch.randn(40, 64, requires_grad=True)
    layer(x).sum().backward()
    keys = layer.key_source.current
    mask = fourbit.functional.keyed_dropout(
        torch.ones(40, 64), 0.25, keys.rows, keys.positions, layer=0, seed=1, step=2
    ).double()
    assert 0.2 < (mask == 0).double().mean() < 0.3
    weight, a, b = dense_layer(layer, torch.float64)
    exact_x = torch.ones(40, 48).double() @ weight + 2.0 * (torch.ones(40, 48).double() @ b @ a) * mask
    torch.testing.assert_close(x.grad.double(), exact_x.detach(), rtol=1e-5, atol=1e-5)
    exact_a = 2.0 * (torch.ones(40, 48).double() @ b).T @ (x.detach().double() * mask)
    torch.testing.assert_close(
        layer.lora_A["default"].weight.grad.double(), exact_a.detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_saved_and_loaded_by_fourbit_and_by_stock_peft(base: torch.nn.Module, tmp_path: Path) -> None:
    model = fourbit.add_lora(base, r=4, dropout=0.0, rslora=True)
    fill_b(model)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids()).logits
    fresh, _ = fourbit.load(tmp_path / "model", compute_dtype="float32")
    again = load_adapter(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, expected)
    dense, _ = fourbit.load(tmp_path / "model", quant_type="none", compute_dtype="float32")
    for name, module in fourbit.load(tmp_path / "model", compute_dtype="float32")[0].named_modules():
        if isinstance(module, Linear4bit):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float32)
    stock = PeftModel.from_pretrained(dense, str(tmp_path / "adapter")).eval()
    assert type(stock.base_model.model.model.layers[0].mlp.up_proj) is PeftLinear
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_merging_into_packed_bytes_is_refused_and_unloading_gives_16_bits(base: torch.nn.Module) -> None:
    model = fourbit.add_lora(base, dropout=0.0)
    fill_b(model)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids()).logits
    with pytest.raises(ModelError, match="cannot be merged into 4-bit weights in place"):
        model.merge_adapter()
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_dora_runs_on_packed_weights(base: torch.nn.Module) -> None:
    model = fourbit.add_lora(base, dropout=0.0, use_dora=True)
    model(input_ids=ids()).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_magnitude" in n)


def test_counts_are_the_true_ones(base: torch.nn.Module) -> None:
    dense = sum(p.numel() for p in fourbit.load(base.config.name_or_path, quant_type="none")[0].parameters())
    model = fourbit.add_lora(base, r=16)
    trainable, total = parameter_counts(model)
    per_layer = 16 * (4 * (64 + 64) - 2 * 32 + 3 * (64 + 128))
    assert trainable == 2 * per_layer
    assert total == dense + trainable


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 14),
        ("attention", 8),
        ("q_proj", 2),
        (["q_proj", "up_proj"], 4),
        (r"model\.layers\.1\..*", 7),
    ],
)
def test_targets(base: torch.nn.Module, targets: str | list[str], expected: int) -> None:
    model = fourbit.add_lora(base, target_modules=targets)
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == expected


def test_targets_that_match_nothing(base: torch.nn.Module) -> None:
    with pytest.raises(
        ConfigError, match=r"'q_prj' matches no layer \(did you mean 'q_proj'\?\); linear layers end in"
    ):
        fourbit.add_lora(base, target_modules=["q_prj"])


def test_a_rank_of_zero(base: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"lora\.r = 0: a rank is at least 1"):
        fourbit.add_lora(base, r=0)


def test_an_adapter_of_another_base(base: torch.nn.Module, tmp_path: Path) -> None:
    fourbit.add_lora(base, r=4).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    from tests.tiny import byte_tokenizer, llama

    llama(hidden=128).save_pretrained(str(tmp_path / "other"))
    byte_tokenizer().save_pretrained(str(tmp_path / "other"))
    other, _ = fourbit.load(tmp_path / "other", compute_dtype="float32")
    with pytest.raises(ModelError, match="does not fit the model"):
        load_adapter(other, tmp_path / "adapter")
    with pytest.raises(ModelError, match="no adapter here"):
        load_adapter(other, tmp_path / "nowhere")


def test_adapters_start_the_same_from_a_seed(base: torch.nn.Module) -> None:
    state = torch.get_rng_state()
    model = fourbit.add_lora(base, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    first = model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.clone()
    again = fourbit.add_lora(model.unload(), seed=3)
    assert torch.equal(again.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight, first)
    assert first.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_stock_peft_on_a_fourbit_model_does_not_corrupt(base: torch.nn.Module) -> None:
    """A merge gives float layers and leaves the packed bytes alone."""
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    packed = base.model.layers[0].mlp.up_proj.base_layer
    before = packed.weight.clone()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(packed.weight, before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: None, None),
        (
            lambda layer: layer.lora_A["default"].register_forward_hook(lambda *_: None),
            "the adapter has hooks",
        ),
        (
            lambda layer: layer.lora_B["default"].register_forward_pre_hook(lambda *_: None),
            "the adapter has hooks",
        ),
        (
            lambda layer: layer.lora_dropout.update({"default": torch.nn.AlphaDropout(0.1)}),
            "its dropout is a AlphaDropout",
        ),
        (lambda layer: layer.lora_bias.update({"default": True}), "the adapter has a bias"),
        (
            lambda layer: setattr(layer.lora_A["default"].weight, "device_mesh", None),
            "the adapter is sharded",
        ),
        (lambda layer: layer.set_adapter(["default", "default"]), "2 adapters are active"),
    ],
)
def test_a_layer_says_why_peft_s_own_code_runs(
    base: torch.nn.Module, change: Any, reason: str | None
) -> None:
    model = fourbit.add_lora(base, r=4, dropout=0.0)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    change(layer)
    assert layer.why_not_fused() == reason
    others = "" if reason is None else f"; left LoRA layers: {reason} (1)"
    report = fuse(model.get_base_model())
    assert report.matched["LoRA layers"] == (14 if reason is None else 13)
    assert report.line().endswith(others)


def test_layers_with_dora_say_so(base: torch.nn.Module) -> None:
    model = fourbit.add_lora(base, r=4, dropout=0.0, use_dora=True)
    assert fuse(model.get_base_model()).left["LoRA layers"] == "DoRA (14)"


def test_hooks_on_the_factors_are_called(base: torch.nn.Module) -> None:
    model = fourbit.add_lora(base, r=4, dropout=0.0)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    tokens = ids()
    plain, seen = model(input_ids=tokens).logits, list[int]()
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(input_ids=tokens).logits, plain, rtol=1e-5, atol=1e-5)
    assert seen == [1]
