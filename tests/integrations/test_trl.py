"""In TRL's trainers: supervised training with our loop's losses, preference training, a head of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from fourbit.nn.linear import Linear4bit
from fourbit.nn.lora import LoraLinear
from tests.integrations.conftest import losses_of_our_loss, quantized
from tests.tiny import byte_tokenizer, save_llama

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # what it has to say of transformers
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def sft(folder: Path, output: Path, rows: list[dict[str, Any]], model: Any) -> Any:
    torch.manual_seed(0)
    arguments = trl.SFTConfig(str(output), max_steps=3, max_grad_norm=1.0, **ARGUMENTS)
    return trl.SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        peft_config=LORA,
    )


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"say {n * 'very '}little", "completion": " yes"} for n in range(count)]


def test_sft_learns_what_our_loop_does(folder: Path, tmp_path: Path) -> None:
    trainer = sft(folder, tmp_path / "run", rows_of(6), quantized(folder))
    model = trainer.model
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 14
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    codes = [module.weight.clone() for module in model.modules() if isinstance(module, Linear4bit)]
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    after = [module.weight for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(codes) == 14
    assert all(torch.equal(one, two) for one, two in zip(codes, after, strict=True))
    with torch.no_grad():  # from the same adapters
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(before[name])
    rows = trainer.train_dataset
    batches = [trainer.data_collator([rows[row] for row in (start, start + 1)]) for start in (0, 2, 4)]
    # " yes" and the end, not the question.
    assert [int((made["labels"] != -100).sum()) for made in batches] == [2 * 5] * 3
    ours = losses_of_our_loss(model, batches)
    # The log has four digits.
    assert [float(loss) for loss in theirs] == pytest.approx(ours, rel=1.5e-4)


def test_dpo_prefers_what_was_chosen(folder: Path, tmp_path: Path) -> None:
    """Before anything is learnt chosen and rejected are one distance from the reference: loss is log 2."""
    torch.manual_seed(0)
    rows = [{"prompt": f"say {n}", "chosen": " yes", "rejected": " no, never"} for n in range(4)]
    arguments = trl.DPOConfig(str(tmp_path / "run"), max_steps=6, **ARGUMENTS)
    trainer = trl.DPOTrainer(
        quantized(folder),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(chat=False),
        peft_config=LORA,
    )
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < 0.6


def test_the_head_that_trl_reads_holds_numbers(folder: Path, tmp_path: Path) -> None:
    """TRL multiplies with `lm_head.weight` itself: it is not packed, whatever else is."""
    untied = save_llama(tmp_path / "untied", torch.float32, tied=False)
    model = quantized(untied, modules_to_not_convert=[])
    assert model.lm_head.weight.dtype == torch.float32
    trainer = sft(untied, tmp_path / "run", rows_of(6), model)
    trainer.train()
    assert trainer.model.get_output_embeddings().weight is model.lm_head.weight
