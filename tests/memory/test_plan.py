"""Plans: exact counts, the arithmetic around them, and what is chosen under a budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fourbit
from fourbit.config_file import load_config, resolve
from fourbit.errors import ConfigError, MemoryBudgetError
from fourbit.kernels import native
from fourbit.kernels.pool import POOL
from fourbit.memory.activations import checkpoint_activations
from fourbit.memory.cards import find_card
from fourbit.memory.choose import Head, alternatives, choose
from fourbit.memory.plan import Choice, Part, Phase, Plan
from fourbit.memory.sizes import parse_size
from fourbit.memory.tracker import PeakTracker
from fourbit.memory.weights import count_weights, loading_bytes
from fourbit.model.adapters import key_source, parameter_counts
from fourbit.nn.attention import use_tiled_attention
from fourbit.nn.fused import fuse
from fourbit.nn.linear import Linear4bit
from fourbit.nn.loss import split_model
from fourbit.training.loop import train_mode
from fourbit.training.planner import Planner
from fourbit.training.prepare import prepare_model
from fourbit.training.rehearse import Rehearsal
from fourbit.training.skeleton import run_skeleton
from fourbit.training.target import Rows, Target
from tests.tiny import save_llama

SHAPES = Path(__file__).parent / "shapes"
#: QLoRA's four models: weights, LoRA r = 64 on all linear layers, weights in linear layers but the head.
LLAMA = {
    "7b": (6_738_415_616, 159_907_840, 6_476_005_376),
    "13b": (13_015_864_320, 250_347_520, 12_687_769_600),
    "33b": (32_528_943_616, 487_587_840, 32_102_154_240),
    "65b": (65_285_660_672, 799_539_200, 64_760_053_760),
}
CPU = Target("CPU", True, torch.bfloat16, None)


@pytest.mark.parametrize("size", LLAMA)
def test_counts_of_the_papers_models_are_exact(size):
    total, adapters, linear = LLAMA[size]
    config = resolve(
        {"model": {"path": str(SHAPES / f"llama-{size}")}, "lora": {"r": 64}, "data": {"train": "rows.jsonl"}}
    )
    weights = count_weights(run_skeleton(config, torch.bfloat16))
    assert (weights.parameters, weights.trainable) == (total, adapters)
    assert weights.codes == linear // 2
    assert weights.scales / linear == pytest.approx(0.126953125 / 8, rel=1e-4)
    assert weights.rest == 2 * (total - linear)
    assert weights.trained == 4 * adapters


def test_counts_of_a_mixture_are_exact():
    """Qwen 3-30B-A3B: 48 layers of 128 experts, each with adapters, and of attention."""
    experts, attention = 128 * (2 * 768 * 2048 + 2048 * 768), 2048 * (4096 + 512 + 512) + 4096 * 2048
    sides = 128 * (2048 + 2 * 768 + 768 + 2048) + 2 * (2048 + 4096) + 2 * (2048 + 512)
    config = resolve(
        {
            "model": {"path": str(SHAPES / "qwen3-30b-a3b")},
            "lora": {"r": 16, "dropout": 0},
            "data": {"train": "rows.jsonl"},
        }
    )
    weights = count_weights(run_skeleton(config, torch.bfloat16))
    assert weights.parameters == 30_532_122_624
    assert weights.trainable == 48 * 16 * sides
    assert weights.codes == 48 * (experts + attention) // 2
    assert weights.largest == 4096 * 2048  # of one matrix, not of a stack
    assert weights.rest == 2 * (30_532_122_624 - 2 * weights.codes)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.double_quant=false", "lora.r=4"),
        ("model.quant_type=none",),
        ("model.quant_type=none", "lora=none"),
        ("lora.target_modules=attention", "lora.modules_to_save=[lm_head]"),
    ],
)
def test_the_skeleton_has_the_bytes_of_the_loaded_model(tmp_path, changes):
    model = save_llama(tmp_path / "model", tied="lora.modules_to_save=[lm_head]" not in changes)
    config = load_config(
        None, [f"model.path={model}", "data.train=x", "model.compute_dtype=bfloat16", *changes]
    )
    from rich.console import Console

    loaded, _ = prepare_model(config, Console(quiet=True))
    planned, real = count_weights(run_skeleton(config, torch.bfloat16)), count_weights(loaded)
    assert planned == real
    assert parameter_counts(loaded)[0] == real.trainable
    assert real.codes + real.scales + real.rest + real.trained == sum(p.nbytes for p in loaded.parameters())


def test_what_loading_takes_beside_the_weights_that_stay():
    """An embedding is read before 4-bit layers and leaves them room; a head after them does not."""
    embedding, layer, head = 1000 * 64 * 4, 64 * 64, 500 * 64 * 4
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(1000, 64, dtype=torch.bfloat16)
    model.layers = torch.nn.ModuleList(Linear4bit(64, 64, bias=False) for _ in range(40))
    packed = sum(p.nbytes for p in model.layers.parameters())
    assert loading_bytes(model, torch.float32, False) == embedding - packed
    assert loading_bytes(model, torch.bfloat16, True) == 0
    model.out = torch.nn.Linear(64, 500, bias=False, dtype=torch.bfloat16)
    assert loading_bytes(model, torch.float32, False) == head
    assert loading_bytes(model, torch.bfloat16, True) == 0
    scales = packed // 40 - layer // 2  # of the last layer, which come after its codes
    assert loading_bytes(model.layers, torch.bfloat16, False) == 2 * layer - scales


def planner(path: Path | str, rows: Rows, **settings: object) -> Planner:
    tree = {"model": {"path": str(path)}, "data": {"train": "x"}, "train": settings}
    return Planner(resolve(tree), CPU, rows, runtime=1000)


def test_a_plan_adds_up_and_grows_with_what_it_is_for(tmp_path):
    model = save_llama(tmp_path / "model")
    found = planner(model, Rows(128))
    small = found.plan(Choice(1, True, 1))
    assert small.peak == sum(part.size for part in small.held) + max(phase.size for phase in small.phases)
    assert {part.name: part.size for part in small.held}["runtime"] == 1000

    def step(found: Planner, rows: int, checkpointing: bool) -> int:
        return found.plan(Choice(rows, checkpointing, 1)).phases[1].size

    more = step(found, 4, True)
    assert step(found, 1, True) < more < step(found, 4, False)
    assert more < step(planner(model, Rows(256)), 4, True)


def forward_of(folder: Path, rows: int, tokens: int, dtype: str) -> tuple[Rehearsal, Any, Any]:
    """The rehearsal of a run, its model as it trains, and a forward pass of it through the decoder."""
    save_llama(folder)
    config = load_config(None, [f"model.path={folder}", "data.train=x", f"model.compute_dtype={dtype}"])
    rehearsal = Rehearsal(run_skeleton(config, getattr(torch, dtype)), fused=True, pooled=True)
    model, _ = prepare_model(config, Console(quiet=True))
    use_tiled_attention(model.get_base_model())
    fuse(model.get_base_model())
    train_mode(model)
    ids, positions = torch.zeros(rows, tokens, dtype=torch.int64), torch.arange(tokens).repeat(rows, 1)
    mask = torch.ones_like(ids)
    mask[0, tokens - 4 :] = 0
    decoder, _ = split_model(model)

    def forward() -> torch.Tensor:
        key_source(model).set(0, 0, ids[:, 0].contiguous(), positions)
        return decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    return rehearsal, model, forward


def test_rehearsed_activations_are_those_that_a_real_step_keeps(tmp_path):
    """What autograd saves for backward, counted by its own hooks, is what the rehearsal says is kept."""
    rehearsal, model, forward = forward_of(tmp_path / "model", 3, 64, "bfloat16")
    with PeakTracker([*model.parameters(), *model.buffers()]) as tracker:
        hidden = forward()
    assert hidden.shape == (3, 64, 64)
    assert rehearsal.layers(3, 64, False).kept == pytest.approx(tracker.live, rel=0.02)


@pytest.mark.skipif(not native.available(), reason="the pool is of native kernels")
def test_rehearsed_blocks_of_the_pool_are_those_that_recomputing_leaves_free(tmp_path):
    rehearsal, model, forward = forward_of(tmp_path / "model", 2, 512, "float32")
    checkpoint_activations(model.get_base_model())
    POOL.release()
    forward().sum().backward()
    hidden = forward()  # held, as the loss holds it
    POOL._collect()
    free = sum(len(block) for block in POOL._free.values())
    assert hidden.requires_grad
    found = rehearsal.layers(2, 512, True).free
    assert found == pytest.approx(free, rel=0.25)  # blocks are rounded up


def test_the_first_choice_that_fits_is_taken_and_the_rest_explained():
    def plan_for(choice: Choice) -> Plan:
        size = 100 * choice.micro_batch * (1 if choice.activation_checkpointing else 5)
        parts = (Part("activations", size),)
        return Plan("m", "CPU", 1, 1, 8, 8, choice, (Part("runtime", 50),), (Phase("a step", parts),))

    choices = alternatives(8, 24, tokens=512)
    assert choices[0] == Choice(8, False, 24)
    assert len(choices) == len(set(choices)) == 4 * 2 * 2 * 2
    plan = choose(plan_for, choices, 900)
    assert (plan.choice, plan.peak, plan.fits) == (Choice(1, False, 24), 550, True)
    resident = [refused.choice for refused in plan.refused if refused.choice.optimizer_memory is None]
    tried = [choice for choice in resident if choice.loss_chunk == 24]
    assert tried == [Choice(8, False, 24), Choice(4, False, 24), Choice(2, False, 24)]
    assert all(refused.peak > 900 and "too much" in refused.reason for refused in plan.refused)
    assert choose(plan_for, choices, 4050).choice == Choice(8, False, 24)
    assert choose(plan_for, choices, 160).choice.activation_checkpointing
    with pytest.raises(MemoryBudgetError, match=r"the least that works here is 0 MB \(micro_batch 1"):
        choose(plan_for, choices, 149)


def test_small_pieces_of_a_large_head_cost_more_than_paging():
    """SmolLM2's head of 49,152 words: 6 MiB of logits are 32 labels, 24 MiB 128."""
    large = alternatives(4, 24, tokens=512, head=Head(0.21, 49_152))
    assert large.index(Choice(4, True, 24, 0)) < large.index(Choice(4, True, 6))
    small = alternatives(4, 24, tokens=512, head=Head(0.02, 1_000))
    assert small.index(Choice(4, True, 24, 0)) > small.index(Choice(4, True, 6))


@pytest.mark.parametrize(("optimizer", "share"), [("adamw", 8), ("adamw_8bit", 2)])
def test_paging_takes_the_states_out_of_memory(optimizer, share):
    """QLoRA's 65B adapters: 6.4 GB of fp32 moments, 1.6 GB of 8-bit ones."""
    config = resolve(
        {
            "model": {"path": str(SHAPES / "llama-65b")},
            "lora": {"r": 64},
            "data": {"train": "rows.jsonl"},
            "train": {"optimizer": optimizer},
        }
    )
    plans = Planner(config, CPU, Rows(256), runtime=0)
    held, half, paged = (plans.plan(Choice(1, True, 24, memory)) for memory in (None, 500, 0))
    states = [next(p.size for p in plan.held if p.name == "optimizer states") for plan in (held, half, paged)]
    assert states[0] == pytest.approx(share * LLAMA["65b"][1], rel=0.02)
    assert 500 << 20 <= states[1] < (500 << 20) + 50e6
    assert states[2] < 50e6
    assert held.peak - paged.peak == states[0] - states[2]


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("900 MB", 900 * 10**6), ("1.5GiB", 3 * 2**29), ("512mib", 2**29), ("4096", 4096)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 bananas", "-1GB", "0MB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="write a size such as 24GB"):
        parse_size(text)


def test_cards_by_name():
    assert find_card("RTX 4090").memory == 24 * 2**30
    assert not find_card("t4").bf16
    with pytest.raises(ConfigError, match="did you mean 'rtx-4090'"):
        find_card("rtx-4009")


def test_the_paper_s_7b_fits_a_card_and_its_65b_does_not_fit_24_gb():
    plan = fourbit.plan(str(SHAPES / "llama-7b"), device="rtx-3060", r=64, max_length=512, memory="12GB")
    assert (plan.parameters, plan.trainable) == LLAMA["7b"][:2]
    assert 6e9 < plan.peak <= 12e9
    assert plan.choice.micro_batch <= plan.effective_batch == 16
    with pytest.raises(ConfigError, match="unknown setting 'rank'"):
        fourbit.plan(str(SHAPES / "llama-7b"), rank=64)


def test_training_after_a_rehearsal_in_the_same_process(tmp_path):
    """No fake tensor stays behind in a cache."""
    from rich.console import Console

    model = save_llama(tmp_path / "model")
    planner(model, Rows(64)).plan(Choice(2, True, 1))
    config = load_config(None, [f"model.path={model}", "data.train=x", "model.compute_dtype=bfloat16"])
    loaded, _ = prepare_model(config, Console(quiet=True))
    loaded(input_ids=torch.zeros(1, 64, dtype=torch.int64)).logits.sum().backward()
    gradients = [p.grad for p in loaded.parameters() if p.requires_grad]
    assert all(type(gradient) is torch.Tensor for gradient in gradients)
    assert json.dumps(replace(planner(model, Rows(64)).plan(Choice(2, True, 1)), refused=()).to_dict())
