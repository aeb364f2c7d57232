"""Falcon, whose linear layers are classes of its own: python examples/falcon.py MODEL ROWS OUTPUT"""

from __future__ import annotations

import sys

import fourbit
from fourbit.model.load import load_report


def main(source: str, rows: str, output: str) -> None:
    base, tokenizer = fourbit.load(source)
    print(load_report(base).line())  # what was packed, and what was left
    # One layer makes queries, keys and values; "all-linear" finds it, dense and the two of the MLP.
    model = fourbit.add_lora(base, r=16, alpha=32, target_modules="all-linear")
    result = fourbit.train(model, tokenizer, rows, output=output, max_steps=20, max_length=512)
    print("held-out loss", result.metrics["heldout_loss"], "adapter in", result.adapter)


if __name__ == "__main__":
    main(*sys.argv[1:])
