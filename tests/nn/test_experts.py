"""Experts in 4 bits: their bytes, and products and gradients against fp64 and the model's own class."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fourbit.functional import dequantize_4bit, quantize_4bit
from fourbit.memory.tracker import fake_tensors
from fourbit.nn.experts import STACKS, Experts4bit, is_experts, pack_experts, quantize_stack
from fourbit.nn.grouped import StackAdapter
from fourbit.nn.matrix import packed_bytes

EXPERTS, HIDDEN, INNER = 5, 24, 13  # no multiples of blocks: matrices of 2 * 13 * 24 and 24 * 13 weights
KINDS = {"mixtral": MixtralExperts, "gpt_oss": GptOssExperts}


def plain(kind: str, hidden: int = HIDDEN, inner: int = INNER) -> Any:
    torch.manual_seed(0)
    name = "num_local_experts"
    config = CONFIG_MAPPING[kind](hidden_size=hidden, intermediate_size=inner, **{name: EXPERTS})
    config._experts_implementation = "eager"
    module = KINDS[kind](config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def packed(
    module: Any, quant_type: str = "nf4", double: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    weights = {name: module.get_parameter(name).detach() for name in STACKS}
    pack_experts(module, quant_type, 64, double, dtype, torch.float32)
    for name, weight in weights.items():
        stack = module.stacks[name]
        matrices = (part.t().contiguous() if stack.transposed else part for part in weight)
        for ending, data in quantize_stack(matrices, stack).items():
            module.register_parameter(name + ending, nn.Parameter(data, requires_grad=False))
    return module.requires_grad_(False)


def routed(tokens: int, k: int, skip: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and shares of each token; one expert gets no row."""
    generator = torch.Generator().manual_seed(tokens)
    allowed = torch.tensor([e for e in range(EXPERTS) if e != skip])
    picks = [allowed[torch.randperm(len(allowed), generator=generator)[:k]] for _ in range(tokens)]
    return torch.stack(picks), torch.rand(tokens, k, generator=generator)


def adapter(stack: Any, r: int = 3, seed: int = 1) -> StackAdapter:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(stack.count, r, stack.in_features, generator=generator)
    b = torch.randn(stack.count, stack.out_features, r, generator=generator)
    return StackAdapter(a.mul_(0.2).requires_grad_(), b.mul_(0.2).requires_grad_())


def truth(module: Any, x: Any, index: Any, shares: Any, adapters: dict[str, StackAdapter]) -> torch.Tensor:
    """The same in fp64, token by token, from restored weights."""
    weights = {}
    for name in STACKS:
        whole = torch.stack([m.dequantize(torch.float32) for m in module.matrices(name)]).double()
        if name in adapters:
            whole = whole + adapters[name].b.double() @ adapters[name].a.double()
        weights[name] = whole
    biases = {name: getattr(module, f"{name}_bias", torch.zeros(EXPERTS, 1)).double() for name in STACKS}
    rows = []
    for token, experts in enumerate(index.tolist()):
        row = torch.zeros(x.shape[1], dtype=torch.float64)
        for place, e in enumerate(experts):
            inner = module._apply_gate(weights[STACKS[0]][e] @ x[token].double() + biases[STACKS[0]][e])
            row = row + shares[token, place].double() * (weights[STACKS[1]][e] @ inner + biases[STACKS[1]][e])
        rows.append(row)
    return torch.stack(rows)


def of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_matrix_is_quantized_as_a_linear_layer_would_be(
    kind: str, double: bool, quant_type: str
) -> None:
    module = plain(kind)
    given = {name: module.get_parameter(name).detach() for name in STACKS}
    module = packed(module, quant_type, double)
    for name in STACKS:
        transposed = module.stacks[name].transposed
        for number, matrix in enumerate(given[name].mT if transposed else given[name]):
            q = quantize_4bit(matrix.contiguous(), quant_type, 64, double)
            for ending, data in packed_bytes(q).items():
                assert torch.equal(module.get_parameter(name + ending)[number], data)
            assert torch.equal(module.matrices(name)[number].dequantize(), dequantize_4bit(q, torch.float32))
        restored = module.dequantize(name)
        assert restored.shape == given[name].shape
        assert (restored - given[name]).norm() < 0.2 * given[name].norm()


@pytest.mark.parametrize("adapted", [(), STACKS[:1], STACKS[1:], STACKS])
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_fp64(kind: str, tokens: int, adapted: tuple[str, ...]) -> None:
    module = packed(plain(kind))
    adapters = {name: adapter(module.stacks[name]) for name in adapted}
    index, shares = routed(tokens, 2)
    shares.requires_grad_()
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(3)).requires_grad_()
    leaves = [x, shares, *(part for low in adapters.values() for part in (low.a, low.b))]
    weight = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(4))
    found = module(x, index, shares, adapters)
    gradients = torch.autograd.grad((found * weight).sum(), leaves)
    wanted = truth(module, x, index, shares, adapters)
    exact = torch.autograd.grad((wanted * weight.double()).sum(), leaves)
    torch.testing.assert_close(of(found), of(wanted), rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(of(one), of(other), rtol=1e-4, atol=1e-5)


def test_in_bf16_errors_are_no_larger_than_the_plain_class_makes() -> None:
    """Against fp64 of the same restored weights; sizes at which native products run where there are any."""
    module = packed(plain("mixtral", 128, 192), dtype=torch.bfloat16)
    own = module.unpacked({name: module.dequantize(name, torch.bfloat16) for name in STACKS})
    index, shares = routed(300, 2)
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = truth(module, x, index, shares, {})

    def error(result: torch.Tensor) -> float:
        return float((of(result) - exact).norm() / exact.norm())

    assert type(own) is MixtralExperts
    assert error(module(x, index, shares)) <= 1.05 * error(own(x, index, shares)) + 1e-4


def test_two_adapters_add_up() -> None:
    module = packed(plain("mixtral"))
    stack = module.stacks[STACKS[0]]
    one, other = adapter(stack, 3), adapter(stack, 2, seed=9)
    index, shares = routed(9, 2)
    x = torch.randn(9, HIDDEN)
    both = {STACKS[0]: one + other}
    torch.testing.assert_close(
        of(module(x, index, shares, both)), of(truth(module, x, index, shares, both)), rtol=1e-5, atol=1e-5
    )
    delta = one.b @ one.a + other.b @ other.a
    torch.testing.assert_close(both[STACKS[0]].b @ both[STACKS[0]].a, delta)


def test_under_autocast_it_computes_in_that_dtype() -> None:
    module = packed(plain("mixtral"), dtype=torch.bfloat16)
    index, shares = routed(9, 2)
    x = torch.randn(9, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x, index, shares)
    assert found.dtype == torch.float32
    assert torch.equal(found, module(x.bfloat16(), index, shares).float())


def test_without_values_shapes_are_right() -> None:
    with fake_tensors():
        module = plain("mixtral")
        pack_experts(module, "nf4", 64, True, torch.float32, torch.float32)
        x = torch.empty(11, HIDDEN, requires_grad=True)
        low = {name: adapter(module.stacks[name]) for name in STACKS}
        y = module(x, torch.zeros(11, 2, dtype=torch.int64), torch.empty(11, 2), low)
        y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert low["down_proj"].a.grad is not None


def test_a_class_is_known_by_what_it_computes() -> None:
    assert is_experts(plain("mixtral"))
    assert is_experts(plain("gpt_oss"))
    with torch.device("meta"):
        assert is_experts(plain("mixtral"))
    llama = Llama4TextExperts(
        SimpleNamespace(num_local_experts=2, intermediate_size=8, hidden_size=8, hidden_act="silu")  # type: ignore[arg-type]
    )
    assert not is_experts(llama)  # it is given all tokens for each expert
    assert not is_experts(nn.Linear(2, 2))


class Doubled(MixtralExperts):
    def forward(self, *args: Any) -> torch.Tensor:
        return 2 * super().forward(*args)


def test_a_class_that_does_more_is_left() -> None:
    module = plain("mixtral")
    module.__class__ = Doubled
    assert not is_experts(module)


def test_biases_that_are_trained_get_their_gradients() -> None:
    module = packed(plain("gpt_oss"))
    biases = [module.gate_up_proj_bias, module.down_proj_bias]
    index, shares = routed(9, 2)
    x = torch.randn(9, HIDDEN)
    frozen = module(x, index, shares)
    for bias in biases:
        bias.requires_grad_()
    found = module(x, index, shares)
    assert torch.equal(found, frozen)
    gradients = torch.autograd.grad(found.square().sum(), biases)
    exact = torch.autograd.grad(truth(module, x, index, shares, {}).square().sum(), biases)
    for one, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(of(one), of(other), rtol=1e-4, atol=1e-5)


def test_its_own_class_is_still_there() -> None:
    module = packed(plain("gpt_oss"))
    assert isinstance(module, Experts4bit)
    assert isinstance(module, GptOssExperts)
    names = [name for name, _ in module.named_parameters()]
    assert [name for name in names if not name.endswith(("_absmax", "_consts"))] == [
        "gate_up_proj",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_bias",
    ]
