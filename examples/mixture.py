"""A mixture of experts, all of which train: python examples/mixture.py MODEL ROWS OUTPUT"""

from __future__ import annotations

import sys

import fourbit
from fourbit.model.load import load_report


def main(source: str, rows: str, output: str) -> None:
    base, tokenizer = fourbit.load(source)
    print(load_report(base).line())
    # Attention and every expert; PEFT's layout has no dropout for experts.
    model = fourbit.add_lora(base, r=16, alpha=32, dropout=0.0)
    result = fourbit.train(model, tokenizer, rows, output=output, max_steps=20, max_length=512)
    print("held-out loss", result.metrics["heldout_loss"], "adapter in", result.adapter)


if __name__ == "__main__":
    main(*sys.argv[1:])
