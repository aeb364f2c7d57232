"""The examples run to their end, on tiny models, and leave an adapter that PEFT reads."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.tiny import byte_tokenizer, save_llama

EXAMPLES = Path(__file__).parents[2] / "examples"
_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
_FALCON = {"num_kv_heads": 2, "new_decoder_architecture": True}
_MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries have to say of each other


def model_of(folder: Path, kind: str, **settings: Any) -> Path:
    if kind == "llama":
        return save_llama(folder)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=len(byte_tokenizer()), **{**_SIZES, **settings})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(str(folder))
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def rows_of(file: Path, texts: bool) -> Path:
    rows = [
        {"text": f"say {n} yes"} if texts else {"prompt": f"say {n}", "completion": " yes"} for n in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def check_adapter(model: Path, folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(str(model))
    adapted = PeftModel.from_pretrained(base, str(folder))
    moved = [p for name, p in adapted.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(moved) >= 8


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("train", "llama", {}),
        ("trainer", "llama", {}),
        ("trl_sft", "llama", {}),
        ("falcon", "falcon", _FALCON),
        ("mixture", "mixtral", _MIXTURE),
    ],
)
def test_an_example(
    name: str, kind: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "trl_sft":
        pytest.importorskip("trl")
    model = model_of(tmp_path / "model", kind, **settings)
    rows = rows_of(tmp_path / "rows.jsonl", texts=name == "trainer")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [name, str(model), str(rows), str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    check_adapter(model, next((tmp_path / "out").glob("**/adapter_config.json")).parent)


@pytest.mark.slow
def test_the_example_of_several_processes(tmp_path: Path) -> None:
    model, rows = model_of(tmp_path / "model", "llama"), rows_of(tmp_path / "rows.jsonl", texts=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(EXAMPLES / "several.py"), str(model), str(rows), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    check_adapter(model, tmp_path / "out" / "adapter")


def test_every_example_is_described() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{file.name}` |" in listed for file in EXAMPLES.glob("*.py"))
