"""Cross-entropy of the output head without the logits.

A causal model's logits are [tokens, vocabulary] in fp32: for 4 x 512 tokens and 49,152 words 400 MB,
most of them for positions that carry no label. Here only labelled positions are taken, a chunk of
rows at a time, and where gradients are wanted the chunk's gradient with respect to the hidden states
is formed at once, so that backward only scales it (the idea of Liger-Kernel's fused linear
cross-entropy and of Wijmans et al., arXiv:2411.09009). The sum over tokens is returned, not the mean:
the caller weights by token over the whole effective batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fourbit.defaults import LOSS_CHUNK
from fourbit.kernels.decode import MOST_DENSE, dense
from fourbit.kernels.native import DTYPES
from fourbit.memory.tracker import has_values
from fourbit.nn.replaced import runs_own_code
from fourbit.ops.library import runs_native
from fourbit.ops.loss import cross_entropy
from fourbit.shapes import with_rounded_rows

IGNORED = -100


class HasLabels(Protocol):
    """What the loss reads of a batch: int64 tensors [rows, tokens]; labels hold the token there, or -100."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor | None: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits.

    scale    factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling)
    softcap  c in c * tanh(logits / c) (Gemma 2 section 2), or None
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] of hidden [T, H]."""
        logits: Tensor
        if self._decodes(hidden):
            logits = dense(hidden, self.module.weight.detach())  # type: ignore[operator]
        else:
            logits = self.module(with_rounded_rows(hidden))[: hidden.shape[0]]
        if self.scale != 1.0:
            logits = logits.float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits.float() / self.softcap)

    def _decodes(self, hidden: Tensor) -> bool:
        """Whether these few rows are decoded on a CPU: reading the head is all that takes time then."""
        if not self.plain or torch.is_grad_enabled() or not 0 < len(hidden) <= MOST_DENSE:
            return False
        head: Any = self.module
        fits = head.bias is None and head.weight.dtype == hidden.dtype and hidden.dtype in DTYPES
        contiguous = head.weight.is_contiguous() and hidden.is_contiguous()
        return fits and contiguous and has_values(hidden) and runs_native(hidden) and runs_own_code(head)

    @property
    def plain(self) -> bool:
        """A frozen or trained `nn.Linear` itself, not a wrapper around one (LoRA, modules_to_save)."""
        return type(self.module) is nn.Linear


def causal_lm_loss(model: nn.Module, batch: HasLabels, chunk: int = LOSS_CHUNK) -> tuple[Tensor, int]:
    """Sum of next-token losses over the labelled positions of a batch, and their number.

    model: a transformers causal LM or a PEFT model around one. chunk: MiB of logits formed at once.
    Returns a fp32 scalar that can be differentiated, and a count. 0 labelled positions give (0, 0).
    """
    head, hidden, targets, wanted = _predictions(model, batch)
    return head_loss(hidden[:, :-1][wanted], head, targets[wanted], chunk)


def row_losses(model: nn.Module, batch: HasLabels) -> tuple[list[float], list[int]]:
    """The same without gradients for each row of the batch: sums of losses, numbers of labelled positions."""
    with torch.no_grad():
        head, hidden, targets, wanted = _predictions(model, batch)
        taken, labels = hidden[:, :-1][wanted], targets[wanted]
        if labels.numel() == 0:
            return [0.0] * wanted.shape[0], [0] * wanted.shape[0]
        rows_at_once = _chunk_rows(_vocabulary(head.module), LOSS_CHUNK)
        losses = [
            cross_entropy(head.logits(part).contiguous(), wished, 1.0, None, gradient=False).double()
            for part, wished in zip(taken.split(rows_at_once), labels.split(rows_at_once), strict=True)
        ]
        rows = wanted.nonzero()[:, 0]
        sums = torch.zeros(wanted.shape[0], dtype=torch.float64, device=hidden.device)
        sums.index_add_(0, rows, torch.cat(losses))
    return sums.tolist(), wanted.sum(dim=1).tolist()


def head_loss(hidden: Tensor, head: Head, labels: Tensor, chunk: int = LOSS_CHUNK) -> tuple[Tensor, int]:
    """Sum of losses of hidden [T, H] against labels [T], none of which is -100, and T."""
    if labels.numel() == 0:
        return hidden.sum() * 0.0, 0
    if head.plain and head.module.bias is None:
        total = _summed(hidden, head.module.weight, labels, head.scale, head.softcap, chunk)
        return total, labels.numel()
    rows = _chunk_rows(_vocabulary(head.module), chunk)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, labels.numel(), rows):
        part = slice(start, start + rows)
        total = total + checkpoint(_module_loss, head, hidden[part], labels[part], use_reentrant=False)
    return total, labels.numel()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, int]:
    """Sum over t of -log softmax(cap(scale * hidden[t] @ weight.T))[labels[t]], and the count.

    hidden  [T, H], bf16 or fp32      weight  [V, H], frozen or trained      labels  int64 [T], -100 ignored
    Returns a fp32 scalar and the number of labels that are not -100.
    """
    keep = labels != IGNORED
    if not bool(keep.all()):
        hidden, labels = hidden[keep], labels[keep]
    return _summed(hidden, weight, labels, scale, softcap), labels.numel()


def _summed(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    chunk: int = LOSS_CHUNK,
) -> Tensor:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # which casts no operand of a product into given memory
        hidden = hidden.to(torch.get_autocast_dtype(device))
    rows = _chunk_rows(weight.shape[0], chunk)
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, scale, softcap, rows)  # type: ignore[no-untyped-call]
    return total


def _predictions(model: nn.Module, batch: HasLabels) -> tuple[Head, Tensor, Tensor, Tensor]:
    """Head, hidden states [B, T, H], what positions 0 to T - 2 predict, and which of them are labelled."""
    decoder, head = split_model(model)
    hidden = decoder(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    # Position t predicts token t + 1.
    targets = batch.labels[:, 1:]
    return head, hidden, targets, targets != IGNORED


def split_model(model: nn.Module) -> tuple[nn.Module, Head]:
    """The decoder that gives hidden states and the head that would turn them into logits."""
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    config = base.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    return base.base_model, Head(base.get_output_embeddings(), scale, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: float,
        softcap: float | None,
        rows: int,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        first = with_rounded_rows(hidden[:rows])  # no chunk has more rows
        room = torch.empty(len(first), len(matrix), dtype=hidden.dtype, device=hidden.device)
        for start in range(0, labels.numel(), rows):
            chunk = slice(start, start + rows)
            taken, wanted = with_rounded_rows(hidden[chunk]), labels[chunk]
            logits, count = room[: len(taken)], len(wanted)
            torch.mm(taken, matrix.t(), out=logits)
            total += cross_entropy(logits[:count], wanted, scale, softcap, need_hidden or need_weight).sum()
            # From here on the gradients, which have taken the logits' place.
            if grad_hidden is not None:
                logits[count:] = 0
                grad_hidden[chunk] = (logits @ matrix)[:count]
            if grad_weight is not None:
                grad_weight += logits[:count].t() @ taken[:count]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _module_loss(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head.logits(hidden).float(), labels, reduction="sum")


def _vocabulary(module: nn.Module) -> int:
    return int(getattr(module, "out_features", 32_768))


def _chunk_rows(vocabulary: int, chunk: int) -> int:
    return max(1, chunk * 2**20 // (4 * vocabulary))
