"""A training step of SmolLM2-135M against the stock stack, and against the limit of its matrix products.

    python benchmarks/train_step.py [--rows 4] [--tokens 512] [--rounds 5] [--threads 2] [--json]
    python benchmarks/train_step.py --model llama-1b-slice --rows 1 --tokens 1024
    python benchmarks/train_step.py --model qwen3-moe-slice --rows 1 --tokens 1024
    python benchmarks/train_step.py --rows 1 --tokens 256 --rounds 50             the same learning
    python benchmarks/train_step.py --dtype float32    with AVX2 alone, ONEDNN_MAX_CPU_ISA=AVX2
                                                       ATEN_CPU_CAPABILITY=avx2 FOURBIT_ISA=avx2 set

Stock is transformers + PEFT + bitsandbytes on the 4-bit checkpoint that `fourbit quantize` writes, with and
without prepare_model_for_kbit_training, the better of which counts. Each side is a process of its own and
takes steps in turn with the others, so that whatever slows the machine slows all: the same rows, every token
labelled, the same first LoRA weights of r = 16 on all linear layers, AdamW at 2e-4, with and without
activation checkpointing. Each step has the next rows of the demo's text (random ones for random weights), so
the losses of the sides can be compared too. Ratios are medians of pairs. The limit is the time of all matrix
products that a step must execute, each at the rate that `torch.mm` reaches for its shape in the same run;
attention counts its causal half, and a mixture's experts the rows that each has if all have as many. Stock
holds experts in 16 bits, as bitsandbytes does, and quantizes a mixture's other layers as it loads them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from machine import machine
from memory import MIXTURES, model_path, write_model
from sides import Worker, answer_all, quantize

RANK, RATE = 16, 2e-4
SIDES = ("fourbit", "stock", "stock prepared")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="or a shape of benchmarks/memory.py")
    parser.add_argument("--dtype", default="bfloat16", help="of products on all sides (default bfloat16)")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="steps that each side takes (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "FOLDER", "KEEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        side, folder, keep = arguments.worker
        return serve(side, Path(folder), keep == "keep", arguments)
    report: dict[str, Any] = {"machine": machine()}
    report |= {key: getattr(arguments, key) for key in ("model", "dtype", "rows", "tokens")}
    with tempfile.TemporaryDirectory(prefix="fourbit-step-") as folder:
        write_model(arguments.model, Path(folder))
        if arguments.model in MIXTURES:
            (Path(folder) / "model").symlink_to(model_path(arguments.model, Path(folder)))
        else:
            quantize(Path(folder), model_path(arguments.model, Path(folder)))
        report["results"] = [compare(Path(folder), keep, arguments) for keep in ("checkpoint", "keep")]
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def compare(folder: Path, keep: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps in turn; the first of each side is not timed."""
    names = ("rows", "tokens", "threads", "dtype", "model")
    options = [f"--{name}={getattr(arguments, name)}" for name in names]
    workers = [Worker(__file__, "--worker", side, str(folder), keep, *options) for side in SIDES]
    taken: list[list[dict[str, Any]]] = [
        [worker.ask("step") for worker in workers] for _ in range(arguments.rounds + 1)
    ]
    limit = workers[0].ask("limit")["seconds"]
    for worker in workers:
        worker.end()
    turns = [[step["seconds"] for step in turn] for turn in taken[1:]]
    count = arguments.rows * arguments.tokens
    losses = {side: [turn[i]["loss"] for turn in taken] for i, side in enumerate(SIDES)}
    return {
        "activations": "checkpointed" if keep == "checkpoint" else "kept",
        "tokens_per_second": {
            side: count / median(turn[i] for turn in turns) for i, side in enumerate(SIDES)
        },
        "ratio": median(min(turn[1:]) / turn[0] for turn in turns),
        "share_of_limit": limit / median(turn[0] for turn in turns),
        "losses": losses,
        "loss_difference": {
            side: max(
                abs(ours / other - 1) for ours, other in zip(losses[SIDES[0]], losses[side], strict=True)
            )
            for side in SIDES[1:]
        },
        "bytes_above_import": {side: taken[-1][i]["bytes"] for i, side in enumerate(SIDES)},
        "turns": turns,
    }


def serve(side: str, folder: Path, keeps: bool, arguments: argparse.Namespace) -> int:
    """Take steps as asked for on stdin, and say on stdout how long each took."""
    import bitsandbytes  # noqa: F401 - part of the bare import on both sides, as PEFT imports it
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from fourbit.memory.measure import peak_resident_bytes, resident_bytes

    before = resident_bytes()
    dtype = getattr(torch, arguments.dtype)
    if side == "fourbit":
        step, model = fourbit_step(folder, keeps, dtype)
    else:
        step, model = stock_step(folder, keeps, side.endswith("prepared"), dtype, arguments.model in MIXTURES)
    batches = batches_of(folder, arguments)

    def answer(question: str) -> dict[str, Any]:
        if question == "limit":
            return {"seconds": limit_of(model, next(batches), keeps, dtype)}
        ids = next(batches)
        began = perf_counter()
        loss = step(ids)
        seconds = perf_counter() - began
        return {"seconds": seconds, "loss": loss, "bytes": peak_resident_bytes() - before}

    return answer_all(answer)


def batches_of(folder: Path, arguments: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Token ids [rows, tokens], batch after batch, the same ones on every side."""
    from transformers import AutoTokenizer

    shape = (arguments.rows, arguments.tokens)
    if arguments.model != "smollm2":
        generator = torch.Generator().manual_seed(1)
        while True:
            yield torch.randint(1000, 30000, shape, generator=generator)
    text = (Path(__file__).parents[1] / "demo" / "banking77" / "train.csv").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder / "model")(text).input_ids)
    while True:
        for piece in ids[: len(ids) // prod(shape) * prod(shape)].split(prod(shape)):
            yield piece.view(shape)


def fourbit_step(
    folder: Path, keeps: bool, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], float], Any]:
    import fourbit
    from fourbit.data.batch import Batch
    from fourbit.memory.activations import checkpoint_activations
    from fourbit.memory.measure import compact_heap
    from fourbit.nn.attention import use_tiled_attention
    from fourbit.nn.fused import fuse
    from fourbit.nn.loss import causal_lm_loss

    compact_heap()  # as `fourbit train` does
    base, _tokenizer = fourbit.load(folder / "model", compute_dtype=str(dtype).removeprefix("torch."))
    model = fourbit.add_lora(base, r=RANK, alpha=2 * RANK, dropout=0.0, seed=0)
    use_tiled_attention(base)
    fuse(base)
    if not keeps:
        checkpoint_activations(base)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = fourbit.PagedAdamW(parameters, RATE)

    def step(ids: torch.Tensor) -> float:
        labels = ids.clone()
        labels[:, 0] = -100
        positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
        rows = torch.arange(len(ids))
        batch = Batch(ids, torch.ones_like(ids), labels, positions, rows)
        total, count = causal_lm_loss(model, batch)
        loss = total / int(count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, model


def stock_step(
    folder: Path, keeps: bool, prepared: bool, dtype: torch.dtype, mixture: bool
) -> tuple[Callable[[torch.Tensor], float], Any]:
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    given: dict[str, Any] = {}
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if mixture:
        four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        given = {"quantization_config": BitsAndBytesConfig(**four_bits)}
        targets = {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        }
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, **given)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
    if prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=not keeps)
    elif not keeps:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, **targets)
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)

    def step(ids: torch.Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found: float = loss.item()
        return found

    return step, model


def limit_of(model: Any, ids: torch.Tensor, keeps: bool, dtype: torch.dtype) -> float:
    """Seconds of a step's matrix products at the rates of torch.mm."""
    from fourbit.nn.packed import packed_parts

    count, length = ids.numel(), ids.shape[1]
    passes = 1 if keeps else 2  # forward passes
    config = model.get_base_model().config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seconds: dict[tuple[int, int, int], float] = {}

    def product(m: int, k: int, n: int) -> float:
        if (m, k, n) not in seconds:
            seconds[m, k, n] = mm_seconds(m, k, n, dtype)
        return seconds[m, k, n]

    total = 0.0
    for part in packed_parts(model):
        n, k = part.shape
        rows = count if part.count == 1 else count * config.num_experts_per_tok // part.count
        one = passes * (product(rows, k, n) + product(rows, k, RANK) + product(rows, RANK, n))
        one += product(rows, n, k)  # the gradient of x; then the adapter's
        one += product(rows, n, RANK) + product(rows, RANK, k)
        total += part.count * (one + product(RANK, rows, k) + product(RANK, rows, n))
    hidden, vocabulary = config.hidden_size, config.vocab_size
    total += product(count, hidden, vocabulary) + product(count, vocabulary, hidden)
    heads = config.num_hidden_layers * config.num_attention_heads * len(ids)
    forward = product(length, width, length) + product(length, length, width)
    backward = 2 * product(length, width, length) + 3 * product(length, length, width)
    return total + heads * (passes * forward + backward) / 2


def mm_seconds(m: int, k: int, n: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    a @ b
    taken = []
    for _ in range(5):
        began = perf_counter()
        a @ b
        taken.append(perf_counter() - began)
    return median(taken)


def table(report: dict[str, Any]) -> str:
    lines = [f"{key:16} {value}" for key, value in report["machine"].items()]
    size = f"{report['rows']} x {report['tokens']} tokens"
    lines += ["", f"{report['model']}, {size}, r = {RANK}, {report['dtype']}", ""]
    names = "".join(f"{name:>10}" for name in ("fourbit", "stock", "prepared"))
    lines.append(f"{'activations':14}{names}{'ratio':>8}{'of limit':>10}{'memory':>22}{'losses within':>18}")
    for row in report["results"]:
        speeds = "".join(f"{row['tokens_per_second'][side]:6,.0f}/s  " for side in SIDES)
        ours, *theirs = (row["bytes_above_import"][side] for side in SIDES)
        memory = f"{ours / 1e9:.2f} GB, {ours / min(theirs):.2f}x"
        differences = ", ".join(f"{part:.2%}" for part in row["loss_difference"].values())
        lines.append(
            f"{row['activations']:14}{speeds}{row['ratio']:6.2f}x{row['share_of_limit']:10.0%}{memory:>22}"
            f"{differences:>18}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
