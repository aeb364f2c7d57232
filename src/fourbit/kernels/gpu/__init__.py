"""The GPU engine: kernels in Triton, which are the reference's on every shape and flag.

Each also runs on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1), where the tests compare it with
the reference. Where bytes count, a product and a sum are never fused into one rounding.

    codec.py      quantize, restore        product.py    a few rows with a packed weight
    dropout.py    keyed dropout            loss.py       cross-entropy of a chunk of logits
    optimizer.py  AdamW, all weights of a page in one launch
"""
