"""Cross-entropy of a chunk of logits with its gradient.

Not an operator of torch.library: what takes its chunks is an autograd function of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.ops.library import runs_triton


def cross_entropy(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum over r of -log softmax(cap(scale * logits[r]))[labels[r]], cap(z) = softcap * tanh(z / softcap).

    logits  [R, V], fp32, bf16 or fp16; overwritten          labels  int64 [R]
    Returns a fp32 scalar and, with `gradient`, its gradient with respect to the logits.
    """
    if runs_triton(logits):
        from fourbit.kernels.gpu import loss as gpu_loss

        logits = logits.contiguous()
        loss = gpu_loss.cross_entropy(logits, labels, scale, softcap, gradient).sum()
        return loss, logits if gradient else None
    logits = logits.float()  # and what was given may go
    return _composed(logits, labels, scale, softcap, gradient)


def _composed(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_normalizer = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, labels[:, None]).squeeze(1)
    loss = (log_normalizer - picked).sum()
    if not gradient:
        return loss, None
    slope = 1 - (logits / softcap) ** 2 if softcap is not None else None
    grad = logits.sub_(log_normalizer[:, None]).exp_()
    grad[torch.arange(labels.numel(), device=labels.device), labels] -= 1
    if slope is not None:
        grad *= slope
    return loss, grad.mul_(scale) if scale != 1.0 else grad
