"""Every recipe resolves, says how to run it, and holds the values its sources give."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from fourbit.config import LoraSettings, RunConfig, TrainSettings, learning_rate_for, suggested_rank
from fourbit.config_file import dump_config, load_config, resolve

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]


@dataclass(frozen=True)
class Llama:
    """What memory depends on in a Llama-shaped model with untied embeddings."""

    layers: int
    hidden: int
    kv: int
    ffn: int
    vocab: int

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        square, kv = (self.hidden, self.hidden), (self.kv, self.hidden)
        return [square, kv, kv, square, *[(self.ffn, self.hidden)] * 2, (self.hidden, self.ffn)]

    @property
    def linear(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linear_shapes)

    @property
    def parameters(self) -> int:
        return self.linear + 2 * self.vocab * self.hidden

    def adapter(self, r: int) -> int:
        return r * self.layers * sum(rows + columns for rows, columns in self.linear_shapes)


LLAMA_7B = Llama(32, 4096, 4096, 11008, 32000)
LLAMA_65B = Llama(80, 8192, 8192, 22016, 32000)
CARDS = {  # recipe: model, bytes of the card (None: any, the figures alone are checked)
    "7b-12gb": (Llama(32, 4096, 1024, 14336, 32768), 12e9),
    "llama-8b-24gb": (Llama(32, 4096, 1024, 14336, 128256), 24e9),
    "qwen-14b-24gb": (Llama(48, 5120, 1024, 13824, 152064), 24e9),
    "65b-48gb": (LLAMA_65B, 48e9),
    "guanaco-7b": (LLAMA_7B, None),
    "guanaco-65b": (LLAMA_65B, None),
}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_resolves_and_round_trips(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert config.output == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_opens_with_its_command_and_reasons(path):
    comment = path.read_text().split("\n\n", 1)[0].splitlines()
    assert all(line.startswith("#") for line in comment)
    assert comment[0].startswith(f"# fourbit train recipes/{path.name}")
    assert any(line.startswith("# Needs ") for line in comment)
    assert any(line.startswith("# Why ") for line in comment)


def test_the_parameter_counts_behind_the_figures_are_the_published_ones():
    assert LLAMA_7B.linear == 6_476_005_376
    assert LLAMA_7B.adapter(64) == 159_907_840
    assert LLAMA_65B.linear == 64_760_053_760
    assert LLAMA_65B.adapter(64) == 799_539_200


@pytest.mark.parametrize("name", CARDS)
def test_the_memory_a_recipe_states_is_its_arithmetic_and_fits(name):
    (model, card), config = CARDS[name], load_config(FOLDER / f"{name}.yaml")
    lora, train = config.lora, config.train
    base = model.linear * 4.126953125 / 8 + (model.parameters - model.linear) * 2
    adapter = model.adapter(lora.r) * 16  # fp32 weight, gradient, two moments
    kept = model.layers * train.micro_batch * config.data.max_length * model.hidden * 2
    text = " ".join(line.lstrip("# ") for line in (FOLDER / f"{name}.yaml").read_text().splitlines())
    total, *parts = map(float, re.search(
        r"by arithmetic ([\d.]+) GB: base ([\d.]+).*?adapter with its optimizer ([\d.]+),"
        r" kept activations ([\d.]+)", text).groups())  # fmt: skip
    assert [round(part / 1e9, 1) for part in (base, adapter, kept)] == parts
    assert total - sum(parts) >= 0.65  # work space: logits in chunks, one layer's recomputation
    assert card is None or total * 1e9 < card
    assert card is None or total * 1e9 > 0.4 * card, "a card this size deserves a larger micro_batch or rank"


@pytest.mark.parametrize("name", [name for name, (_, card) in CARDS.items() if card])
def test_rank_and_learning_rate_suit_the_size(name):
    model, config = CARDS[name][0], load_config(FOLDER / f"{name}.yaml")
    low, high = suggested_rank(model.parameters)
    assert config.lora.alpha == 2 * config.lora.r
    assert config.train.learning_rate == learning_rate_for(model.parameters)
    if name == "65b-48gb":  # memory, as the recipe says
        assert low / 2 == config.lora.r
    else:
        assert low <= config.lora.r <= high


@pytest.mark.parametrize(
    ("size", "learning_rate", "dropout"), [("7b", 2e-4, 0.1), ("65b", 1e-4, 0.05)], ids=["7b", "65b"]
)
def test_guanaco_is_the_papers(size, learning_rate, dropout):
    """QLoRA appendix B and table 9, OASST1."""
    config = load_config(FOLDER / f"guanaco-{size}.yaml")
    assert (config.model.quant_type, config.model.block_size, config.model.double_quant) == ("nf4", 64, True)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (64, 16, dropout)
    assert config.lora.target_modules == "all-linear"
    assert config.data.max_length == 16 + 512
    train = config.train
    assert (train.learning_rate, train.max_steps, train.schedule) == (learning_rate, 1875, "constant")
    assert (train.effective_batch, train.max_grad_norm, train.beta2) == (16, 0.3, 0.999)
    assert (train.weight_decay, train.warmup_ratio, train.group_by_length) == (0.0, 0.0, True)
    assert 9846 * train.epochs / train.effective_batch >= train.max_steps


def test_the_defaults_are_the_sourced_ones():
    lora, train = LoraSettings(), TrainSettings()
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (16, 32, 0.05, "all-linear")
    assert (train.effective_batch, train.max_grad_norm, train.warmup_ratio) == (16, 0.3, 0.03)
    assert (train.learning_rate, learning_rate_for(7_000_000_000)) == ("auto", 2e-4)
    assert learning_rate_for(13_000_000_000) == 2e-4
    assert learning_rate_for(32_528_943_616) == learning_rate_for(65_285_660_672) == 1e-4
    assert [suggested_rank(size) for size in (135_000_000, 65_000_000_000)] == [(8, 16), (64, 128)]
    config = resolve({"model": {"path": "m"}, "data": {"train": "d"}})
    assert isinstance(config, RunConfig)
    assert (config.model.quant_type, config.model.block_size, config.model.double_quant) == ("nf4", 64, True)
