"""Training steps of Llama shapes against transformers + PEFT, and under caps of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from big_model import SHAPES as PAPER
from big_model import WORDS
from gpu_common import DEVICE, HALF, Row, named, seconds
from torch import Tensor

#: hidden size, feed-forward, layers, heads, heads of keys, words; and rows and tokens of a step.
SHAPES = {
    "1B": ((2048, 5632, 22, 32, 4, 32000), (4, 1024)),
    "8B": ((4096, 14336, 32, 32, 8, 128256), (2, 1024)),
    # The paper's models, whose queries have keys of their own.
    **{name.upper(): ((*shape, shape[-1], WORDS), (1, 512)) for name, shape in PAPER.items()},
    "tiny": ((64, 128, 2, 4, 2, 259), (2, 16)),
}
RANK, RATE = 16, 2e-4
#: Shape, rank, bits of the optimizer's states (8: paged, none on the card), the cap in GB, where weights are.
CAPS = (
    ("7B", 16, 32, 8, "device"),
    ("13B", 16, 32, 12, "device"),
    ("33B", 16, 32, 24, "device"),
    ("65B", 64, 8, 48, "device"),
    ("65B", 64, 8, 24, "host"),
)


def steps(tiny: bool) -> list[Callable[[], Row]]:
    wanted = [("tiny", True), ("tiny", False)] if tiny else [("1B", True), ("1B", False), ("8B", True)]
    return [
        named(f"{name}, {'checkpointed' if again else 'kept'}", lambda n=name, a=again: compare(n, a))
        for name, again in wanted
    ]


def memory(tiny: bool) -> list[Callable[[], Row]]:
    caps = [("tiny", 4, 8, 1, where) for where in ("device", "host")] if tiny else CAPS
    return [
        named("paged states against unpaged", lambda: time_paging(tiny)),
        *(
            named(f"{cap[0]}, r = {cap[1]}, {cap[3]} GB, weights on {cap[4]}", lambda cap=cap: capped(*cap))
            for cap in caps
        ),
    ]


def compare(name: str, again: bool) -> Row:
    """Tokens a second and peak of both sides; again: activations are checkpointed, on both."""
    rows, tokens = SHAPES[name][1]
    taken, peaks = {}, {}
    for side in ("fourbit", "stock"):
        with peak_of(peaks, side):
            taken[side] = seconds(stepper(name, side, again), 5)
    return {
        "tokens_per_s": rows * tokens / taken["fourbit"],
        "times_stock": taken["stock"] / taken["fourbit"],
        "peak_gb": peaks["fourbit"],
        "stock_peak_gb": peaks["stock"],
        "stock": "bitsandbytes" if has_bitsandbytes() else "16-bit LoRA",
    }


def capped(name: str, rank: int, bits: int, cap: int, weights: str) -> Row:
    """Steps with activation checkpointing, where the card gives no more than so many GB."""
    peaks: dict[str, float] = {}
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 1e9 / total), DEVICE)
    try:
        with peak_of(peaks, "all"):
            step = stepper(name, "fourbit", True, rank, bits, 0 if bits == 8 else None, weights)
            loss, taken = step(), seconds(step, 2)
            del step
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    return {"peak_gb": peaks["all"], "step_s": taken, "finite": loss == loss}


class peak_of:
    """A block whose peak on the card, in GB, is noted; what it leaves behind is given back."""

    def __init__(self, peaks: dict[str, float], name: str) -> None:
        self._peaks, self._name = peaks, name

    def __enter__(self) -> None:
        self._empty()
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_: object) -> None:
        self._peaks[self._name] = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0
        self._empty()

    def _empty(self) -> None:
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def stepper(
    name: str,
    side: str,
    again: bool,
    rank: int = RANK,
    bits: int = 32,
    states: int | None = None,
    weights: str = "device",
) -> Callable[[], float]:
    """A call that takes one step; both sides form the logits of a chunk of rows at a time.

    bits, states  of fourbit's optimizer, and the bytes of its states that stay on the card; None: all
    weights       where fourbit's packed weights are: device or host
    """
    from fourbit.memory.activations import checkpoint_activations
    from fourbit.nn.loss import causal_lm_loss
    from fourbit.optim import PagedAdamW

    ours = side == "fourbit"
    model = fourbit_model(name, rank, weights) if ours else stock_model(name, rank)
    base = model.get_base_model()
    if again and ours:
        checkpoint_activations(base)
    elif again:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any
    if ours:
        optimizer = PagedAdamW(trained, RATE, bits=bits, memory=states)
    else:
        optimizer = torch.optim.AdamW(trained, RATE, fused=DEVICE.type == "cuda")
    batch = Batch(*SHAPES[name][1], SHAPES[name][0][-1])

    def step() -> float:
        if ours:
            total, count = causal_lm_loss(model, batch)
            loss = total / count
        else:
            hidden = base.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            loss = chunked_loss(base.lm_head, hidden[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


class Batch:
    """Random tokens, all of them trained."""

    def __init__(self, rows: int, tokens: int, words: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.input_ids = torch.randint(0, words, (rows, tokens), generator=generator).to(DEVICE)
        self.labels = self.input_ids.clone()
        self.attention_mask = None
        self.position_ids = torch.arange(tokens, device=DEVICE).expand(rows, tokens)


def chunked_loss(head: Any, hidden: Tensor, labels: Tensor, rows: int = 512) -> Tensor:
    """The mean loss, its logits computed again in backward."""
    from torch.utils.checkpoint import checkpoint

    def part(x: Tensor, wanted: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(head(x).float(), wanted, reduction="sum")

    total = torch.zeros((), device=hidden.device)
    for x, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(part, x, wanted, use_reentrant=False)
    return total / labels.numel()


def fourbit_model(name: str, rank: int, weights: str) -> Any:
    """Random packed weights, made where they stay: no 16-bit copy is ever there."""
    from transformers import AutoModelForCausalLM

    from fourbit.memory.stream import stream_from_host
    from fourbit.model.adapters import add_lora
    from fourbit.model.quantizer import fill_randomly, pack_skeleton

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(name), dtype=HALF)
        pack_skeleton(model, {f"{path}.weight" for path in linear_layers(model)}, "nf4", 64, True, HALF)
    model.to_empty(device=DEVICE if weights == "device" else "cpu")
    fill_randomly(model)
    model.requires_grad_(False)
    if weights == "host":
        stream_from_host(model, list(model.model.layers), DEVICE)
    return add_lora(model, r=rank, alpha=2 * rank, dropout=0.0, seed=0)


def stock_model(name: str, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(llama(name), dtype=HALF)
    if has_bitsandbytes():
        import bitsandbytes as bnb

        for path, module in linear_layers(model).items():
            other = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=HALF, quant_type="nf4"
            )
            weight = module.weight.data.cpu()
            other.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, other.to(DEVICE))
    model.requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def linear_layers(model: Any) -> dict[str, Any]:
    """All but the head, by name."""
    named_modules = model.named_modules()
    return {name: m for name, m in named_modules if type(m) is torch.nn.Linear and name != "lm_head"}


def llama(name: str) -> Any:
    from transformers import LlamaConfig

    hidden, inner, layers, heads, kv_heads, words = SHAPES[name][0]
    return LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None and DEVICE.type == "cuda"


def time_paging(tiny: bool) -> Row:
    """Steps of an optimizer whose states all stay on the card, and of one whose states lie in host memory."""
    from fourbit.optim import PagedAdamW

    size, count = (300, 3) if tiny else (65536, 448)
    taken = []
    for budget in (None, 0):
        weights = [torch.nn.Parameter(torch.zeros(size, device=DEVICE)) for _ in range(count)]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer = PagedAdamW(weights, memory=budget)
        taken.append(seconds(optimizer.step))
        optimizer.close()
    return {"ms": 1000 * taken[0], "paged_ms": 1000 * taken[1], "share": taken[0] / taken[1]}
