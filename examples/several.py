"""Several processes: torchrun --nproc-per-node 2 examples/several.py MODEL ROWS OUTPUT"""

from __future__ import annotations

import sys

import fourbit


def main(source: str, rows: str, output: str) -> None:
    # Every process runs this; together they train one adapter, as one process would.
    base, tokenizer = fourbit.load(source)
    model = fourbit.add_lora(base, r=16, alpha=32, target_modules="all-linear")
    result = fourbit.train(
        model, tokenizer, rows, output=output, max_steps=20, max_length=512, shard_weights=True
    )
    print("held-out loss", result.metrics["heldout_loss"], "adapter in", result.adapter)


if __name__ == "__main__":
    main(*sys.argv[1:])
