"""Random models whose next tokens differ from prompt to prompt, and one that has learned four answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fourbit.cli.main import main
from fourbit.config import DataSettings
from fourbit.data.batch import collate
from fourbit.data.encode import encode
from fourbit.data.row import Row
from fourbit.model.adapters import add_lora
from fourbit.nn.loss import causal_lm_loss
from tests.tiny import byte_tokenizer, llama

Run = Callable[..., tuple[int, str, str]]
SIZES: dict[str, Any] = {
    "vocab_size": len(byte_tokenizer()),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Shorter than the prompts of the tests, so that it binds.
WINDOW = 9

COLORS = {"grass?": "green", "sky?": "blue", "snow?": "white", "blood?": "red"}


def lively(model: Any) -> Any:
    """Weights large enough that attention is sharp and every prompt is answered otherwise."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(12.0)
    return model.eval()


def build(kind: str, seed: int = 0) -> Any:
    """A lively model by name: llama, eager, window (every layer), mixed (one layer of two)."""
    torch.manual_seed(seed)
    if kind == "window":
        return lively(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)))
    if kind == "mixed":
        config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
        return lively(Qwen2ForCausalLM(config))
    model = lively(llama(seed=seed))
    if kind == "eager":
        model.set_attn_implementation("eager")
    return model


def random_prompts(count: int, shared: int, seed: int = 1) -> list[list[int]]:
    """Prompts of 1 to 14 random tokens after `shared` tokens that all begin with."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, SIZES["vocab_size"], (shared,), generator=generator).tolist()
    lengths = torch.randint(1, 15, (count,), generator=generator).tolist()
    return [
        start + torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist()
        for length in lengths
    ]


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return [
        Row({"prompt": prompt, "completion": color}, "colors.jsonl", line)
        for line, (prompt, color) in enumerate(COLORS.items(), start=1)
    ]


@pytest.fixture(scope="session")
def learned(rows: list[Row]) -> LlamaForCausalLM:
    """A tiny Llama trained until it answers each question of COLORS and stops."""
    model, tokenizer = llama(), byte_tokenizer()
    batch = collate(encode(rows, tokenizer, DataSettings(train=("colors.jsonl",))).examples, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss, count = causal_lm_loss(model, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() / count < 0.05
    return model.eval()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        code = main(list(words))
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def model_folder(tmp_path: Path, learned: LlamaForCausalLM) -> str:
    folder = tmp_path / "model"
    learned.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter_folder(tmp_path: Path) -> str:
    """An adapter that changes the base so much that it answers otherwise."""
    folder = tmp_path / "adapter"
    add_lora(build("llama"), r=4, init_lora_weights=False).save_pretrained(
        str(folder), save_embedding_layers=False
    )
    return str(folder)
