"""Tokens decoded in one native call: the same as by the model's own code, or the model keeps its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fourbit
from fourbit.evaluate import stack as decoding
from fourbit.evaluate.context import inference, prefill
from fourbit.evaluate.generate import generate
from fourbit.evaluate.stack import Stack, Unfit
from fourbit.kernels import native
from fourbit.kernels.decode import dense
from fourbit.nn.linear import Linear4bit

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native library: {native.load_error()}")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
#: Architectures of this structure: a bias, norms of heads, a window, heads of their own width, 1 + weight.
FITTING: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen2-layers": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 5,
        "use_sliding_window": True,
    },
}  # fmt: skip
#: What looks like it and computes more, and what does not look like it.
OTHERS = {"granite": {"residual_multiplier": 0.5}, "olmo2": {}, "gpt_neox": {}}


def model(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind.split("-")[0], **SIZES, **changes)
    made: Any = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for name, module in list(made.named_modules()):
        for key, layer in list(module.named_children()):
            if type(layer) is nn.Linear and f"{name}.{key}".strip(".") != "lm_head":
                if layer.bias is not None:
                    nn.init.normal_(layer.bias)
                setattr(module, key, Linear4bit.from_linear(layer, block_size=32))
        if name.endswith("norm"):
            nn.init.normal_(module.weight, 1.0, 0.1)
    return made.eval().requires_grad_(False)


def adapted(base: Any, **options: Any) -> Any:
    made = fourbit.add_lora(base, r=4, **options)
    for name, parameter in made.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
    return made


def prompts(count: int) -> list[list[int]]:
    """Of several lengths, with a beginning that all share."""
    generator = torch.Generator().manual_seed(1)
    tails = [torch.randint(3, 96, (1 + n % 5,), generator=generator).tolist() for n in range(count)]
    return [[*range(3, 15), *tail] for tail in tails]


@pytest.fixture(params=native.isas() if native.available() else ())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A call computed by the model's own code."""

    def computed(call: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "agreeing_stack", lambda *_: None)
            return call(*args, **kwargs)

    return computed


def decoded(made: Any, rows: int, steps: int = 9) -> tuple[torch.Tensor, Stack | None]:
    """Logits [steps, B, V] after fixed tokens."""
    found = []
    with inference(made):
        for _, batch in prefill(made, prompts(rows), rows):
            for step in range(steps):
                ids = (torch.arange(rows)[:, None] * 7 + step) % 90 + 3
                found.append(batch.extend(ids, batch.lengths[:, None], last=1)[:, -1])
            return torch.stack(found), batch._decoding._stack
    raise AssertionError


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("kind", FITTING)
def test_logits_of_the_models_own_code(kind: str, rows: int, isa: str, own: Any) -> None:
    made = adapted(model(kind, **FITTING[kind]))
    wanted, _ = own(decoded, made, rows)
    found, stack = decoded(made, rows)
    many = not isinstance(stack, Stack)
    assert many == (rows > 16 and isa in ("scalar", "neon"))  # no product of many rows there
    assert torch.allclose(found, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_near_to_fp32(dtype: torch.dtype, own: Any) -> None:
    truth, _ = own(decoded, model("llama"), 3)
    made = model("llama", dtype)
    near, stack = decoded(made, 3)
    plain, _ = own(decoded, made, 3)
    assert isinstance(stack, Stack)
    errors = [(logits.float() - truth).norm() / truth.norm() for logits in (near, plain)]
    assert errors[0] < 1.3 * errors[1] + 1e-4


def test_answers_are_the_same(own: Any) -> None:
    """Rows that leave the batch, caches that are copied."""
    made = adapted(model("llama"))
    wanted = own(generate, made, prompts(9), [5, 6, 7], 40, batch_size=4)
    assert generate(made, prompts(9), [5, 6, 7], 40, batch_size=4) == wanted


def test_a_fork_leaves_the_other_alone(own: Any) -> None:
    made = model("llama")

    def two() -> list[torch.Tensor]:
        with inference(made):
            (_, first), *_ = prefill(made, prompts(2), 2)
            ids = torch.tensor([[9], [11]])
            first.extend(ids, first.lengths[:, None], last=1)
            second = first.fork()
            logits = [second.extend(ids + 1, second.lengths[:, None], last=1)]
            logits += [first.extend(ids + 2, first.lengths[:, None], last=1)]
            second.select(torch.tensor([1]))
            return [*logits, second.extend(ids[:1], second.lengths[:, None], last=1)]

    for found, wanted in zip(two(), own(two), strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_keep_their_code(kind: str, own: Any) -> None:
    made = model(kind, **OTHERS[kind])
    found, stack = decoded(made, 2)
    wanted, _ = own(decoded, made, 2)
    assert stack is None
    assert torch.equal(found, wanted)


def test_gemma_either_way(own: Any) -> None:
    """Norms of 1 + weight, and GELU; who scales its embeddings depends on the version of transformers."""
    made = model("gemma", head_dim=16)
    assert torch.allclose(decoded(made, 2)[0], own(decoded, made, 2)[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "fits"), [({}, True), ({"rslora": True}, True), ({"use_dora": True}, False)]
)
def test_adapters(options: dict[str, bool], fits: bool, own: Any) -> None:
    made = adapted(model("llama"), **options) if "use_dora" not in options else dora(model("llama"))
    found, stack = decoded(made, 2)
    assert (stack is not None) == fits
    assert torch.allclose(found, own(decoded, made, 2)[0], atol=1e-4)
    with made.disable_adapter():
        without, stack = decoded(made, 2)
        assert stack is not None
        assert torch.allclose(without, own(decoded, made, 2)[0], atol=1e-4)
    assert not torch.allclose(found, without, atol=1e-3)


def dora(base: Any) -> Any:
    from peft import LoraConfig

    made = fourbit.add_lora(base, r=4)
    made.add_adapter("dora", LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    made.set_adapter("dora")
    for name, parameter in made.named_parameters():
        if ".lora_B.dora" in name:
            nn.init.normal_(parameter, 0.0, 2.0)
    return made


def test_a_layer_that_is_watched_runs_its_own_code() -> None:
    made, calls = model("llama"), []
    hook = made.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(Unfit, match="hooks watch its layers"):
        Stack(made)
    generate(made, prompts(1), [], 5)
    assert len(calls) >= 5
    hook.remove()
    Stack(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 576, 1000), (2, 100, 70), (3, 17, 33), (4, 40, 1)])
def test_the_head_of_few_rows(size: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    rows, width, words = size
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(words, width).to(dtype)
    found = dense(x, weight)
    truth = x.double() @ weight.double().T
    plain = (x.float() @ weight.float().T).to(dtype)
    assert (found.double() - truth).norm() <= 1.1 * (plain.double() - truth).norm() + 1e-6 * truth.norm()
    assert torch.equal(found[:1], dense(x[:1], weight))


def test_what_is_not_packed_is_unfit() -> None:
    made = model("llama")
    made.model.layers[1].mlp.up_proj = nn.Linear(64, 160, bias=False)
    with pytest.raises(Unfit, match="Linear is not packed"):
        Stack(made)
