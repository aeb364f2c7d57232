"""Cross-entropy of a chunk of logits in Triton, whose gradient takes the logits' place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Words that a program reads at once.
_WORDS = 4096


def cross_entropy(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    """-log softmax(cap(scale * logits))[label] of each row, fp32 [R]; cap(z) = softcap * tanh(z / softcap).

    logits    contiguous [R, V], fp32, bf16 or fp16; with `gradient` overwritten by the gradient of the sum of
              losses with respect to them
    labels    int64 [R], each a word
    """
    rows, words = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        size = min(_WORDS, triton.next_power_of_2(words))
        cap = 0.0 if softcap is None else softcap
        _cross_entropy[(rows,)](
            logits, labels, loss, words, scale, cap, softcap is not None, gradient, size,
            enable_fp_fusion=True,
        )  # fmt: skip
    return loss


@triton.jit
def _capped(logit, scale, softcap, CAP: tl.constexpr):
    value = logit.to(tl.float32) * scale
    if CAP:
        value = softcap * (2.0 / (1.0 + tl.exp(-2.0 * value / softcap)) - 1.0)
    return value


@triton.jit
def _cross_entropy(
    logits, labels, loss, words, scale, softcap,
    CAP: tl.constexpr, GRADIENT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * words
    label = tl.load(labels + row)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS)
        logit = tl.load(logits + word, mask=word < words, other=0.0)
        value = tl.where(word < words, _capped(logit, scale, softcap, CAP), float("-inf"))
        higher = tl.maximum(highest, tl.max(value, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(value - higher), axis=0)
        highest = higher
    normalizer = highest + tl.log(total)
    picked = _capped(tl.load(logits + label), scale, softcap, CAP)
    tl.store(loss + row, normalizer - picked)
    if GRADIENT:
        for first in range(0, words, WORDS):
            word = first + tl.arange(0, WORDS)
            logit = tl.load(logits + word, mask=word < words, other=0.0)
            value = _capped(logit, scale, softcap, CAP)
            slope = tl.exp(value - normalizer) - tl.where(word == label, 1.0, 0.0)
            if CAP:
                slope = slope * (1.0 - (value / softcap) * (value / softcap))
            tl.store(logits + word, (slope * scale).to(logits.dtype.element_ty), mask=word < words)
