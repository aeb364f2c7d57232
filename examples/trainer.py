"""transformers.Trainer with a stock collator: python examples/trainer.py MODEL ROWS OUTPUT"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fourbit


def main(source: str, rows: str, output: str) -> None:
    config = fourbit.FourBitConfig()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=rows, split="train").map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=["text"]
    )
    arguments = TrainingArguments(output, max_steps=20, learning_rate=2e-4, report_to=[], save_strategy="no")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
    model.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
