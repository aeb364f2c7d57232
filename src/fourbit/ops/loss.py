"""Cross-entropy of a chunk of logits, whose gradient takes their place."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.errors import QuantizationError
from fourbit.kernels import elementwise as native_elementwise
from fourbit.ops.codec import check_float
from fourbit.ops.library import define, runs_native, runs_triton

#: Logits that the composed code widens at once.
_PIECE = 1 << 20


def cross_entropy(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    """-log softmax(cap(scale * logits[r]))[labels[r]] of each row, cap(z) = softcap * tanh(z / softcap).

    logits  contiguous [R, V], fp32, bf16 or fp16; with `gradient` overwritten by the gradients of the losses
            with respect to them, in their dtype
    labels  int64 [R], each from 0 to V - 1; QuantizationError for others on a CPU

    Returns fp32 [R].
    """
    loss: Tensor = torch.ops.fourbit.cross_entropy(logits, labels, scale, softcap, gradient)
    return loss


def _cross_entropy(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    _check(logits, labels)
    if runs_triton(logits):
        from fourbit.kernels.gpu import loss as gpu_loss

        return gpu_loss.cross_entropy(logits, labels, scale, softcap, gradient)
    if logits.device.type == "cpu" and labels.numel():
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise QuantizationError(f"labels go from {low} to {high}; the head has {logits.shape[1]} words")
    if runs_native(logits):
        return native_elementwise.cross_entropy(logits, labels, scale, softcap, gradient)
    loss = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    rows = max(1, _PIECE // logits.shape[1])
    for part, wanted, into in zip(logits.split(rows), labels.split(rows), loss.split(rows), strict=True):
        found, grad = composed(part.float(), wanted, scale, softcap)
        into.copy_(found)
        if gradient:
            part.copy_(grad)
    return loss


def _fake(logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool) -> Tensor:
    _check(logits, labels)
    return logits.new_empty(labels.shape, dtype=torch.float32)


def _check(logits: Tensor, labels: Tensor) -> None:
    check_float(logits.dtype, "logits")
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.is_contiguous():
        raise QuantizationError(
            f"a cross-entropy takes contiguous logits [R, V] and labels [R]; they are {list(logits.shape)} "
            f"and {list(labels.shape)}"
        )


def composed(logits: Tensor, labels: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The same of torch's own operators: losses [R] and gradients [R, V] in the dtype of the logits."""
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_normalizer = torch.logsumexp(logits, dim=-1)
    loss = log_normalizer - logits.gather(1, labels[:, None]).squeeze(1)
    grad = (logits - log_normalizer[:, None]).exp_()
    grad[torch.arange(labels.numel(), device=labels.device), labels] -= 1
    if softcap is not None:
        grad *= 1 - (logits / softcap) ** 2
    return loss, grad.mul_(scale)


define(
    "cross_entropy(Tensor(a!) logits, Tensor labels, float scale, float? softcap, bool gradient) -> Tensor",
    _cross_entropy,
    _fake,
)
