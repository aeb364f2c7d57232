"""TRL's supervised training: python examples/trl_sft.py MODEL ROWS OUTPUT"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import fourbit


def main(source: str, rows: str, output: str) -> None:
    config = fourbit.FourBitConfig()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output,
            max_steps=20,
            max_length=512,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
