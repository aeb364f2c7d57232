"""fourbit's own loop: python examples/train.py MODEL ROWS OUTPUT"""

from __future__ import annotations

import sys

import fourbit


def main(source: str, rows: str, output: str) -> None:
    base, tokenizer = fourbit.load(source, quant_type="nf4", double_quant=True)
    model = fourbit.add_lora(base, r=16, alpha=32, target_modules="all-linear")
    result = fourbit.train(model, tokenizer, rows, output=output, max_steps=20, max_length=512)
    print("held-out loss", result.metrics["heldout_loss"], "adapter in", result.adapter)


if __name__ == "__main__":
    main(*sys.argv[1:])
