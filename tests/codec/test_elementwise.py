"""RMS norm, gated activations, rotary embedding: no worse than torch, the same bits everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fourbit import reference
from fourbit.errors import QuantizationError
from fourbit.kernels import elementwise as native_elementwise
from fourbit.kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 15), (7, 577))
#: One rounding of an exact result is below this; torch's own error may be smaller by chance.
EPSILON = {torch.float32: 4e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}
ops = torch.ops.fourbit


def no_worse(ours: Tensor, theirs: Tensor, truth: Tensor, epsilon: float) -> None:
    size = truth.norm() + 1e-30
    own, other = (ours.double() - truth).norm() / size, (theirs.double() - truth).norm() / size
    assert ours.dtype == theirs.dtype
    assert own <= other + epsilon, f"{own:.2e} against torch's {other:.2e}"


def norm_of(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = F.rms_norm(x, (x.shape[1],), weight.to(x.dtype), 1e-5)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(implementation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, grad = (3 * torch.randn(shape).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1]).to(dtype).float()
    truth = norm_of(x.double(), weight, grad.double())
    torch_s = norm_of(x, weight, grad)
    y, scale = ops.rms_norm(x, weight, 1e-5)
    no_worse(y, torch_s[0], truth[0], EPSILON[dtype])
    # With a single column the gradient cancels to almost nothing; its error is measured by its terms.
    grad_x = ops.rms_norm_backward([grad], None, x, weight, scale)
    if shape[1] > 1:
        no_worse(grad_x, torch_s[1], truth[1], EPSILON[dtype])


@pytest.mark.parametrize("grads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_around_a_norm(implementation: str, dtype: torch.dtype, grads: int) -> None:
    x, more, passed, *given = (torch.randn(7, 577).to(dtype) for _ in range(3 + grads))
    weight = torch.randn(577)
    total, y, scale = ops.add_rms_norm(x, more, weight, 1e-5)
    assert torch.equal(total, x + more)
    assert torch.equal(ops.add(x, more), total)
    assert all(torch.equal(a, b) for a, b in zip((y, scale), ops.rms_norm(total, weight, 1e-5), strict=True))
    exact = sum(grad.double() for grad in given)
    truth = norm_of(total.double(), weight, exact)[1] + passed.double()
    theirs = norm_of(total, weight, sum(given))[1] + passed
    no_worse(ops.rms_norm_backward(given, passed, total, weight, scale), theirs, truth, EPSILON[dtype])


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated(implementation: str, shape: tuple[int, int], dtype: torch.dtype, kind: int) -> None:
    gate, up, grad = (4 * torch.randn(shape).to(dtype) for _ in range(3))

    def by_torch(wanted: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        g, u = (t.detach().to(wanted).requires_grad_() for t in (gate, up))
        out = (F.silu(g) if kind == 0 else F.gelu(g, approximate="tanh")) * u
        return out.detach(), *torch.autograd.grad(out, [g, u], grad.to(wanted))

    ours = (ops.gated(gate, up, kind), *ops.gated_backward(grad, gate, up, kind))
    for own, other, true in zip(ours, by_torch(dtype), by_torch(torch.float64), strict=True):
        no_worse(own, other, true, EPSILON[dtype])


def angles(rows: int, length: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, of other angles in the second half: no model has them, the formula allows them."""
    turned = 7 * torch.randn(rows, length, width)
    return turned.cos().to(dtype), turned.sin().to(dtype)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 14), (3, 1, 70, 64)], ids=str)
def test_rotary(
    implementation: str, shape: tuple[int, int, int, int], dtype: torch.dtype, shared: bool, by_token: bool
) -> None:
    batch, heads, length, width = shape
    x = torch.randn(batch, length, heads, width + 3)[..., :width].transpose(1, 2).to(dtype)
    x = x if by_token else x.contiguous()
    cos, sin = angles(1 if shared else batch, length, width, dtype)
    y, wide = ops.rotary(x, cos, sin, False), x.double().requires_grad_()
    first, second = wide.chunk(2, dim=-1)
    truth = wide * cos.double()[:, None] + torch.cat([-second, first], dim=-1) * sin.double()[:, None]
    assert y.transpose(1, 2).is_contiguous()
    assert torch.equal(y, reference.rotary(x, cos, sin, False))
    torch.testing.assert_close(y, truth.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    grad = torch.randn(shape).to(dtype)
    grad_x = ops.rotary(grad, cos, sin, True)
    assert torch.equal(grad_x, reference.rotary(grad, cos, sin, True))
    truth = torch.autograd.grad(truth, wide, grad.double())[0]
    torch.testing.assert_close(grad_x, truth.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", [0, 1])
def test_activations_far_out(implementation: str, kind: int) -> None:
    gate = torch.tensor([-1e12, -3e4, -89.0, -88.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 88.0, 3e4, 1e12])
    up = torch.ones_like(gate)
    value = ops.gated(gate, up, kind)
    slope, _ = ops.gated_backward(up, gate, up, kind)
    expected = F.silu(gate) if kind == 0 else F.gelu(gate, approximate="tanh")
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert torch.all((slope > -0.2) & (slope < 1.2)), slope


@pytest.mark.skipif(not native.available(), reason="compares native code")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_every_instruction_set_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    x, grad, up = (torch.randn(170, 203).to(dtype) for _ in range(3))  # more than two tasks of 16,384 values
    weight, heads = torch.randn(203), torch.randn(2, 7, 85, 34).to(dtype)
    cos, sin = angles(2, 85, 34, dtype)
    before, found = native.isa(), []
    for isa, threads in ((isa, threads) for isa in native.isas() for threads in (1, 3)):
        native.set_isa(isa)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y, scale = native_elementwise.rms_norm(x, weight, 1e-6)
        found.append(
            [
                y,
                scale,
                native_elementwise.rms_norm_backward([grad], None, x, weight, scale),
                native_elementwise.rms_norm_backward([grad, x, up], up, x, weight, scale),
                *native_elementwise.add_rms_norm(x, up, weight, 1e-6),
                *(native_elementwise.gated(x, up, kind) for kind in (0, 1)),
                *(part for kind in (0, 1) for part in native_elementwise.gated_backward(grad, x, up, kind)),
                *(native_elementwise.rotary(heads, cos, sin, back) for back in (False, True)),
            ]
        )
    native.set_isa(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_nan_stays_where_it_is(implementation: str) -> None:
    x = torch.randn(3, 40).bfloat16()
    x[1, 7] = torch.nan
    y, _ = ops.rms_norm(x, torch.ones(40), 1e-6)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
    out = ops.gated(x, torch.ones_like(x), 0)
    assert out.isnan().sum() == 1
    assert out[1, 7].isnan()


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(QuantizationError, match="needs weight fp32"):
        ops.rms_norm(x, torch.ones(8).bfloat16(), 1e-6)
    for more in (x[:1], x.bfloat16()):
        with pytest.raises(QuantizationError, match="what is added must be alike"):
            ops.add_rms_norm(x, more, torch.ones(8), 1e-6)
    with pytest.raises(QuantizationError, match="1 to 3 gradients, not 4"):
        ops.rms_norm_backward([x] * 4, None, x, torch.ones(8), torch.ones(2))
    with pytest.raises(QuantizationError, match="must be alike"):
        ops.gated(x, x[:1], 0)
    with pytest.raises(QuantizationError, match="no activation 7"):
        ops.gated(x, x, 7)
    heads, (cos, sin) = torch.randn(2, 1, 3, 8), angles(3, 3, 8, torch.float32)
    for own, c, s in (
        (heads, cos, sin),
        (heads, cos[:1], sin),
        (heads[..., :7], cos[:1, :, :7], sin[:1, :, :7]),
    ):
        with pytest.raises(QuantizationError, match="a rotary embedding of x"):
            ops.rotary(own, c, s, False)


def test_operators_trace() -> None:
    x, weight = torch.randn(4, 8), torch.ones(8)
    scale = reference.rms_norm(x, weight, 1e-6)[1]
    for op, arguments in (
        (ops.rms_norm, (x, weight, 1e-6)),
        (ops.rms_norm_backward, ([x, x], x, x, weight, scale)),
        (ops.add_rms_norm, (x, x, weight, 1e-6)),
        (ops.add, (x, x)),
        (ops.gated, (x, x, 0)),
        (ops.gated_backward, (x, x, x, 1)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
