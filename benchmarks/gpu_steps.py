"""Training steps of Llama shapes against transformers + PEFT, and under caps of memory."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from big_model import SHAPES as PAPER
from big_model import WORDS
from gpu_common import DEVICE, HALF, Row, named, seconds
from gpu_kernels import bound_of
from torch import Tensor

#: Tokens of one text; longer rows are packed with several.
TEXT = 1024
#: hidden size, feed-forward, layers, heads, heads of keys, words; and rows and tokens of a step.
SHAPES = {
    "1B": ((2048, 5632, 22, 32, 4, 32000), (4, 1024)),
    "8B": ((4096, 14336, 32, 32, 8, 128256), (1, 4096)),
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
    """Both sides, and LoRA on a base in 16 bits with this engine; again: all checkpoint activations.

    share_of_rate  operations of the matrix products over the time and the card's rate
    *_beyond_gb    the peak beyond the base's weights
    """
    rows, tokens = SHAPES[name][1]
    taken, peaks, beyond = {}, {}, {}
    for side in ("fourbit", "stock", "16-bit"):
        with peak_of(peaks, side):
            step = stepper(name, side, again)
            base = step.base_gb  # type: ignore[attr-defined]
            taken[side] = seconds(step, 5)
            del step
        beyond[side] = peaks[side] - base
    return {
        "tokens_per_s": rows * tokens / taken["fourbit"],
        "times_stock": taken["stock"] / taken["fourbit"],
        "times_16_bit": taken["16-bit"] / taken["fourbit"],
        "share_of_rate": operations(name, again) / taken["fourbit"] / bound_of(name == "tiny").rate,
        "peak_gb": peaks["fourbit"],
        "stock_peak_gb": peaks["stock"],
        "beyond_gb": beyond["fourbit"],
        "stock_beyond_gb": beyond["stock"],
        "stock": "bitsandbytes" if has_bitsandbytes() else "16-bit LoRA",
    }


def operations(name: str, again: bool) -> float:
    """Of a step's products: with frozen weights forward, again, and backward in x; and causal attention."""
    hidden, inner, layers, heads, kv_heads, words = SHAPES[name][0]
    rows, tokens = SHAPES[name][1]
    weights = 2 * hidden * hidden + 2 * hidden * (hidden // heads) * kv_heads + 3 * hidden * inner
    forwards = 2 if again else 1
    # Of two products forward; backward has five, the scores again among them.
    attention = 2 * hidden * min(TEXT, tokens) / 2 * (2 * forwards + 5)
    per_token = layers * (2 * weights * (forwards + 1) + attention) + 2 * 2 * words * hidden
    return float(rows * tokens * per_token)


def capped(name: str, rank: int, bits: int, cap: int, weights: str) -> Row:
    """Steps with activation checkpointing, where the card gives no more than so many GB."""
    peaks: dict[str, float] = {}
    plan = {"predicted_gb": predicted_gb(name, rank, bits, weights)} if find_spec("pydantic") else {}
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
    return {"peak_gb": peaks["all"], **plan, "step_s": taken, "finite": loss == loss}


def predicted_gb(name: str, rank: int, bits: int, weights: str) -> float:
    """What `fourbit plan` expects torch to allocate in such a step."""
    from fourbit.config_file import resolve
    from fourbit.training.planner import plan_run
    from fourbit.training.target import Rows

    rows, tokens = SHAPES[name][1]
    train = {"micro_batch": rows, "effective_batch": rows, "activation_checkpointing": True}
    train |= {"optimizer": "adamw_8bit", "optimizer_memory": 0} if bits == 8 else {"optimizer": "adamw"}
    with tempfile.TemporaryDirectory(prefix="fourbit-gpu-") as folder:
        llama(name).save_pretrained(folder)
        config = resolve(
            {
                "model": {"path": folder, "weight_tier": weights if DEVICE.type == "cuda" else "device"},
                "lora": {"r": rank, "dropout": 0},
                "data": {"train": "rows.jsonl", "max_length": tokens},
                "train": train,
            }
        )
        plan = plan_run(config, device=DEVICE.type, rows=Rows(tokens, count=rows, words=0, heldout=(0, 0)))
    step = next(phase for phase in plan.phases if phase.name == "a training step")
    return sum(part.size for part in (*plan.held, *step.parts) if part.name != "runtime") / 1e9


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
    """A call that takes one step, with `base_gb`, what frozen weights take.

    All sides form the logits of a chunk of rows at a time.

    bits, states  of fourbit's optimizer, and the bytes of its states that stay on the card; None: all
    weights       where fourbit's packed weights are: device or host
    """
    from fourbit.memory.activations import checkpoint_activations
    from fourbit.nn.loss import causal_lm_loss
    from fourbit.optim import PagedAdamW

    ours = side != "stock"
    before = allocated()
    model = fourbit_model(name, rank, weights, packed=side == "fourbit") if ours else stock_model(name, rank)
    base = model.get_base_model()
    if again and ours:
        checkpoint_activations(base)
    elif again:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    base_gb = (allocated() - before - sum(p.nbytes for p in trained)) / 1e9
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
            hidden = base.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).last_hidden_state
            loss = chunked_loss(base.lm_head, hidden[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    step.base_gb = base_gb  # type: ignore[attr-defined]
    return step


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


class Batch:
    """Random tokens, all of them trained."""

    def __init__(self, rows: int, tokens: int, words: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.input_ids = torch.randint(0, words, (rows, tokens), generator=generator).to(DEVICE)
        self.labels = self.input_ids.clone()
        self.attention_mask = None
        self.position_ids = (torch.arange(tokens, device=DEVICE) % TEXT).expand(rows, tokens)


def chunked_loss(head: Any, hidden: Tensor, labels: Tensor, rows: int = 512) -> Tensor:
    """The mean loss, its logits computed again in backward."""
    from torch.utils.checkpoint import checkpoint

    def part(x: Tensor, wanted: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(head(x).float(), wanted, reduction="sum")

    total = torch.zeros((), device=hidden.device)
    for x, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(part, x, wanted, use_reentrant=False)
    return total / labels.numel()


def fourbit_model(name: str, rank: int, weights: str, packed: bool = True) -> Any:
    """Random weights, made where they stay: of packed ones no 16-bit copy is ever there."""
    from transformers import AutoModelForCausalLM

    from fourbit.memory.stream import stream_from_host
    from fourbit.model.adapters import add_lora
    from fourbit.model.quantizer import fill_randomly, pack_skeleton

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(name), dtype=HALF)
        if packed:
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
