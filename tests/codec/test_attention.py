"""Attention: no worse than torch in the same dtype, for every shape, mask, layout and instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fourbit.errors import QuantizationError

#: One rounding of an exact result is below this; torch's own error may be smaller by chance.
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
ops = torch.ops.fourbit


def first_of(kind: str, batch: int, length: int) -> Tensor:
    """int32 [batch, length]: the first key that each query sees."""
    places = torch.arange(length, dtype=torch.int32).expand(batch, -1)
    if kind == "causal":
        return torch.zeros_like(places)
    if kind == "window":
        return (places - 4).clamp(min=0)
    if kind == "alone":
        return places.clone()
    # Packed rows, one of them a single token.
    cuts = torch.tensor([0, length // 3, length // 3 + 1, 2 * length // 3])
    return cuts[torch.searchsorted(cuts, places.contiguous(), right=True) - 1].to(torch.int32)


def by_torch(given: list[Tensor], first: Tensor, dtype: torch.dtype) -> list[Tensor]:
    q, k, _, grad = given
    leaves = [x.detach().to(dtype).requires_grad_() for x in given[:3]]
    places = torch.arange(q.shape[2])
    mask = (places >= first[:, :, None]) & (places <= places[:, None])
    groups = q.shape[1] // k.shape[1]
    repeated = (x.repeat_interleave(groups, dim=1) for x in leaves[1:])
    out = F.scaled_dot_product_attention(leaves[0], *repeated, attn_mask=mask[:, None], scale=0.3)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def tensors(heads: int, kv_heads: int, length: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient of the output; some of them as views that lie differently in memory."""
    torch.manual_seed(length + width)
    q = torch.randn(2, length, heads, width).to(dtype).transpose(1, 2)
    k = torch.randn(2, length, kv_heads, width + 3).to(dtype)[..., :width].transpose(1, 2)
    v = torch.randn(2, kv_heads, length, width).to(dtype)
    return [q, k, v, torch.randn(2, heads, length, width).to(dtype)]


@pytest.mark.parametrize("kind", ["causal", "window", "packed", "alone"])
@pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "width"),
    [
        (2, 1, 1, 16),
        (3, 3, 7, 5),
        (4, 2, 65, 24),
        (6, 2, 131, 64),
        (2, 2, 64, 80),
        (4, 1, 330, 96),
        (2, 1, 257, 256),
    ],
)
def test_no_worse_than_torch(
    implementation: str, heads: int, kv_heads: int, length: int, width: int, dtype: torch.dtype, kind: str
) -> None:
    q, k, v, grad = tensors(heads, kv_heads, length, width, dtype)
    first = first_of(kind, 2, length)
    out, lse = ops.attention(q, k, v, first, 0.3)
    ours = [out, *ops.attention_backward(grad, q, k, v, out, lse, first, 0.3)]
    given = [q, k, v, grad]
    truth, theirs = by_torch(given, first, torch.float64), by_torch(given, first, dtype)
    for name, own, other, true in zip("oqkv", ours, theirs, truth, strict=True):
        size = true.norm() + grad.double().norm() / 10  # a query that sees one key has no gradient
        own_error, other_error = (own.double() - true).norm() / size, (other.double() - true).norm() / size
        assert own.dtype == dtype
        assert own_error <= other_error + EPSILON[dtype], (
            f"{name}: {own_error:.2e} against torch's {other_error:.2e}"
        )
    assert out.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
def test_a_key_that_is_no_number_is_seen(implementation: str, dtype: torch.dtype) -> None:
    q, k, v, _ = tensors(2, 1, 131, 64, dtype)
    first = first_of("causal", 2, 131)
    whole, _lse = ops.attention(q, k, v, first, 0.3)
    k[0, 0, 70] = float("nan")
    out, _lse = ops.attention(q, k, v, first, 0.3)
    assert out[0, :, 70:].isnan().all()
    assert torch.equal(out[0, :, :70], whole[0, :, :70])
    assert torch.equal(out[1], whole[1])


@pytest.mark.parametrize("width", [128, 256])
def test_wide_heads_and_large_scores(isa: str, width: int) -> None:
    q, k, v, grad = tensors(2, 1, 70, width, torch.bfloat16)
    first = first_of("causal", 2, 70)
    q, k = 8 * q, 8 * k  # scores of some thousands: nothing may overflow
    out, lse = ops.attention(q, k, v, first, 0.3)
    for x in (out, lse, *ops.attention_backward(grad, q, k, v, out, lse, first, 0.3)):
        assert x.isfinite().all()
    assert (out.double() - by_torch([q, k, v, grad], first, torch.float64)[0]).abs().max() < 0.05


def test_a_query_is_blind_to_what_it_does_not_see(isa: str) -> None:
    q, k, v, _ = tensors(2, 2, 90, 16, torch.bfloat16)
    first = first_of("packed", 2, 90)
    before, _ = ops.attention(q, k, v, first, 0.3)
    k[:, :, :30], v[:, :, :30], k[:, :, 80:], v[:, :, 80:] = 50, 50, -50, -50
    after, _ = ops.attention(q, k, v, first, 0.3)
    assert torch.equal(before[:, :, 31:80], after[:, :, 31:80])


def test_threads_do_not_change_a_bit(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = tensors(4, 2, 150, 32, torch.bfloat16)
    first, found = first_of("window", 2, 150), []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out, lse = ops.attention(q, k, v, first, 0.3)
        found.append([out, lse, *ops.attention_backward(grad, q, k, v, out, lse, first, 0.3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = tensors(4, 2, 5, 8, torch.float32)
    first = first_of("causal", 2, 5)
    with pytest.raises(QuantizationError, match="H a multiple of Hkv"):
        ops.attention(q[:, :3], k, v, first, 1.0)
    with pytest.raises(QuantizationError, match=r"first int32 \[2, 5\]"):
        ops.attention(q, k, v, first.long(), 1.0)
    torch.library.opcheck(ops.attention, (q, k, v, first, 1.0), test_utils=("test_schema", "test_faketensor"))
