"""What an implementation of the cross-entropy of a chunk of logits must give."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fourbit.ops.loss import composed

Case = tuple[torch.dtype, int, int]
#: dtype, rows, words
CASES: list[Case] = [
    (dtype, rows, words)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for rows, words in ((1, 1), (3, 7), (4, 5000), (2, 9001))
]
#: Factor on logits and their cap.
_FORMS = ((1.0, None), (0.5, None), (1.0, 30.0), (0.7, 5.0))


def check_against_fp64(cross_entropy: Callable[..., torch.Tensor], case: Case, device: torch.device) -> None:
    """No further from fp64 than torch in fp32, rounded; without gradients nothing is written."""
    dtype, rows, words = case
    generator = torch.Generator().manual_seed(words)
    logits = (8 * torch.randn(rows, words, generator=generator)).to(device, dtype)
    labels = torch.randint(0, words, (rows,), generator=generator).to(device)
    for scale, softcap in _FORMS:
        truth, slope = composed(logits.double(), labels, scale, softcap)
        single, theirs = composed(logits.float(), labels, scale, softcap)
        given = logits.clone()
        without = cross_entropy(given, labels, scale, softcap, False)
        assert torch.equal(given, logits)
        found = cross_entropy(given, labels, scale, softcap, True)
        assert torch.equal(found, without)
        total = abs(truth.sum().item())
        error = abs(found.sum().item() - truth.sum().item())
        # A few units in the last place of fp32, in which the losses come.
        assert error <= 2 * abs(single.sum().item() - truth.sum().item()) + 1e-6 * total + 1e-6
        wide = (given.double() - slope).abs().max()
        assert wide <= 1.05 * (theirs.to(dtype).double() - slope).abs().max() + 1e-6
