"""The 4-bit product and its gradient, as a function and as a module."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fourbit import functional as F4
from fourbit.errors import QuantizationError
from fourbit.kernels.product import FEW_ROWS, FEW_ROWS_AMX
from fourbit.nn.linear import Linear4bit
from fourbit.ops.workspace import workspace
from fourbit.tensor import QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# in, out: whole blocks, half blocks, odd ones, fewer than a block, more outputs than a kernel's tile.
SHAPES = ((256, 48), (96, 33), (101, 37), (7, 3), (1, 1), (64, 1000), (4304, 5))


def weight(out_features: int, in_features: int, double_quant: bool = True, **how: object) -> QuantizedTensor:
    return F4.quantize_4bit(torch.randn(out_features, in_features), double_quant=double_quant, **how)


def worst(got: Tensor, truth: Tensor) -> float:
    """Largest error as a share of the largest true value."""
    return ((got.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS_AMX, FEW_ROWS_AMX + 1, FEW_ROWS, FEW_ROWS + 1, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_product_is_as_exact_as_torchs(
    implementation: str, rows: int, dtype: torch.dtype, biased: bool
) -> None:
    for number, (in_features, out_features) in enumerate(SHAPES):
        q = weight(out_features, in_features, number % 2 == 0, quant_type=("nf4", "fp4", "int4")[number % 3])
        x = torch.randn(rows, in_features).to(dtype)
        bias = torch.randn(out_features).to(dtype) if biased else None
        w = F4.dequantize_4bit(q, torch.float32)
        truth = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        torchs = worst(F.linear(x, w.to(dtype), bias), truth)
        assert worst(F4.linear_4bit(x, q, bias), truth) <= torchs + 2 * torch.finfo(dtype).eps, (
            in_features,
            out_features,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_and_many_rows_agree(implementation: str, dtype: torch.dtype) -> None:
    for in_features, out_features in SHAPES:
        q, x = weight(out_features, in_features), torch.randn(2 * FEW_ROWS, in_features).to(dtype)
        many = F4.linear_4bit(x, q)
        few = torch.cat([F4.linear_4bit(part, q) for part in x.split(FEW_ROWS_AMX)])
        # Relative to the sum of magnitudes: weights and results are rounded once, and sums of K products
        # in fp32 drift by the square root of K roundings (Higham and Mary, 2019).
        drift = 2 * torch.finfo(dtype).eps + 2 * in_features**0.5 * torch.finfo(torch.float32).eps
        magnitude = x.double().abs() @ F4.dequantize_4bit(q, torch.float32).double().abs().T
        share = ((few.double() - many).abs() / magnitude.clamp(min=1e-30)).max().item()
        assert share <= drift, (in_features, out_features)


@pytest.mark.parametrize("rows", [2, 40])
def test_gradients_against_fp64(implementation: str, rows: int) -> None:
    for in_features, out_features in SHAPES:
        q = weight(out_features, in_features)
        x = torch.randn(rows, in_features, requires_grad=True)
        bias = torch.randn(out_features, requires_grad=True)
        grad = torch.randn(rows, out_features)
        F4.linear_4bit(x, q, bias).backward(grad)
        true_x, true_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
        F.linear(true_x, F4.dequantize_4bit(q, torch.float32).double(), true_bias).backward(grad.double())
        for got, truth in ((x.grad, true_x.grad), (bias.grad, true_bias.grad)):
            assert (got - truth).norm() <= 1e-5 * truth.norm()
        assert torch.equal(F4.linear_4bit_grad(grad, q), x.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_in_16_bits_is_as_exact_as_torchs(implementation: str, dtype: torch.dtype) -> None:
    q = weight(48, 256)
    grad = torch.randn(20, 48).to(dtype)
    w = F4.dequantize_4bit(q, torch.float32)
    truth = grad.double() @ w.double()
    assert (
        worst(F4.linear_4bit_grad(grad, q), truth)
        <= worst(grad @ w.to(dtype), truth) + torch.finfo(dtype).eps
    )


def test_second_derivative(implementation: str) -> None:
    # The product is linear: the gradient's gradient is the product again.
    q, x = weight(8, 64), torch.randn(3, 64, requires_grad=True)
    grad = torch.randn(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(F4.linear_4bit(x, q), x, grad, create_graph=True)
    along = torch.randn(3, 64)
    (second,) = torch.autograd.grad(first, grad, along)
    torch.testing.assert_close(second, F4.linear_4bit(along, q))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_no_rows(implementation: str, shape: tuple[int, ...]) -> None:
    q, x = weight(9, 70), torch.randn(*shape, 70, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    y = F4.linear_4bit(x, q, bias)
    assert y.shape == (*shape, 9)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros(9))


def test_no_columns_and_no_outputs(implementation: str) -> None:
    bias = torch.randn(4)
    for rows in (1, 50):
        assert torch.equal(F4.linear_4bit(torch.empty(rows, 0), weight(4, 0), bias), bias.expand(rows, 4))
        assert torch.equal(F4.linear_4bit(torch.empty(rows, 0), weight(4, 0)), torch.zeros(rows, 4))
        assert F4.linear_4bit(torch.randn(rows, 6), weight(0, 6)).shape == (rows, 0)


def test_leading_dimensions_and_strides(implementation: str) -> None:
    q = weight(33, 96)
    for x in (
        torch.randn(96),
        torch.randn(2, 3, 4, 96),
        torch.randn(96, 40).T,
        torch.randn(7, 5, 192)[..., ::2],
    ):
        y = F4.linear_4bit(x, q)
        assert y.shape == (*x.shape[:-1], 33)
        # Another number of rows may take another summation order inside torch, hence not equal.
        torch.testing.assert_close(y, F.linear(x, F4.dequantize_4bit(q)), rtol=1e-5, atol=1e-4)
    x = torch.randn(5, 7, 96).transpose(0, 1).requires_grad_()
    F4.linear_4bit(x, q).backward(torch.randn(33, 5, 7).permute(2, 1, 0))
    assert x.grad.shape == x.shape


def test_result_owns_its_memory(implementation: str) -> None:
    q, x = weight(64, 64), torch.randn(64, 64)
    y = F4.linear_4bit(x, q)
    kept = y.clone()
    F4.linear_4bit(-x, q)
    F4.linear_4bit_grad(x, q)
    assert torch.equal(y, kept)


def test_autocast_decides_the_dtype() -> None:
    q, x = weight(8, 64), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = F4.linear_4bit(x, q, torch.randn(8))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_errors_name_the_shapes() -> None:
    x = torch.randn(2, 64)
    with pytest.raises(
        QuantizationError, match=r"input of shape \[2, 64\] does not fit a weight \[8, 65\]; its"
    ):
        F4.linear_4bit(x, weight(8, 65))
    with pytest.raises(QuantizationError, match=r"two dimensions, this one has shape \[2, 4, 8\]"):
        F4.linear_4bit(x, F4.quantize_4bit(torch.randn(2, 4, 8)))
    with pytest.raises(
        QuantizationError, match=r"bias must have 8 values of torch.float32, it has shape \[7\]"
    ):
        F4.linear_4bit(x, weight(8, 64), torch.randn(7))
    with pytest.raises(QuantizationError, match=r"input of a 4-bit product is torch.float64; convert"):
        F4.linear_4bit(x.double(), weight(8, 64))


def test_threads_do_not_share_a_workspace(implementation: str) -> None:
    layers = [weight(96, 128) for _ in range(4)]
    x = torch.randn(FEW_ROWS + 4, 128)
    expected = [F4.linear_4bit(x, q) for q in layers]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(200):
            if not torch.equal(F4.linear_4bit(x, layers[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_workspace_is_one_growing_buffer_per_dtype() -> None:
    cpu = torch.device("cpu")

    def in_a_new_thread() -> None:
        with torch.inference_mode():
            first = workspace((3, 5), torch.float32, cpu)
        assert not first.is_inference()  # it would refuse to be written to
        assert workspace((15,), torch.float32, cpu).data_ptr() == first.data_ptr()
        assert workspace((15,), torch.bfloat16, cpu).data_ptr() != first.data_ptr()
        assert workspace((1000, 1000), torch.float32, cpu).shape == (1000, 1000)
        assert workspace((2,), torch.float32, cpu).untyped_storage().nbytes() == 4_000_000

    with ThreadPoolExecutor(1) as executor:
        executor.submit(in_a_new_thread).result()


# --- the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(implementation: str, use_reentrant: bool) -> None:
    stack = nn.Sequential(*(Linear4bit.from_linear(nn.Linear(80, 80)) for _ in range(3)))
    x = torch.randn(30, 80, requires_grad=True)
    stack(x).square().sum().backward()
    plain, x.grad = x.grad, None
    y = x
    for layer in stack:
        y = checkpoint(layer, y, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, plain)


def test_only_packed_bytes_are_saved_for_backward() -> None:
    layer = Linear4bit.from_linear(nn.Linear(256, 256, bias=False))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(100, 256, requires_grad=True))
    assert sum(t.nbytes for t in saved) <= layer.quantized().nbytes + 64  # and the codebook


def state(layer: nn.Module) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("double_quant", [False, True])
def test_casts_leave_the_bytes_alone(double_quant: bool) -> None:
    layer = Linear4bit.from_linear(nn.Linear(100, 33), double_quant=double_quant)
    before, x = state(layer), torch.randn(4, 100)
    expected = layer.dequantize(torch.float32)
    for cast in (
        nn.Module.half,
        nn.Module.double,
        nn.Module.float,
        lambda m: m.to(torch.bfloat16),
        nn.Module.bfloat16,
    ):
        cast(layer)
        after = state(layer)
        assert {k: v for k, v in after.items() if k != "bias"} == {
            k: v for k, v in before.items() if k != "bias"
        }
        assert torch.equal(layer.dequantize(torch.float32), expected)
    assert layer.bias.dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_state_dict_from_meta_round_trip(double_quant: bool, biased: bool) -> None:
    made = Linear4bit.from_linear(
        nn.Linear(101, 37, bias=biased), double_quant=double_quant, quant_type="fp4", block_size=32
    )
    empty = Linear4bit(
        101,
        37,
        biased,
        quant_type="fp4",
        block_size=32,
        double_quant=double_quant,
        dtype=torch.float32,
        device="meta",
    )
    assert empty(torch.empty(3, 101, device="meta")).shape == (3, 37)
    loaded = copy.deepcopy(empty).to_empty(device="cpu")
    loaded.load_state_dict(made.state_dict())
    empty.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(3, 101)
    for layer in (loaded, empty, copy.deepcopy(made)):
        assert state(layer) == state(made)
        assert torch.equal(layer(x), made(x))


def test_scale_bytes_that_start_anywhere() -> None:
    # As a reader of safetensors may hand them out.
    made = Linear4bit.from_linear(nn.Linear(100, 33), double_quant=False)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), made.weight_absmax])[1:]
    expected = made.dequantize()
    made.weight_absmax = nn.Parameter(shifted, requires_grad=False)
    assert torch.equal(made.dequantize(), expected)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_module_is_the_function(implementation: str, compute_dtype: torch.dtype | None) -> None:
    linear = nn.Linear(96, 40)
    layer = Linear4bit.from_linear(linear, compute_dtype=compute_dtype)
    q = F4.quantize_4bit(linear.weight, double_quant=True)
    x = torch.randn(5, 96)
    expected = F4.linear_4bit(x.to(compute_dtype or x.dtype), q, linear.bias).to(x.dtype)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.dequantize(), F4.dequantize_4bit(q))
    assert layer.W_q is layer.weight
    assert layer.quantized().codes.data_ptr() == layer.weight.data_ptr()
    assert isinstance(layer, nn.Linear)


def test_custom_codebook_in_a_module() -> None:
    codebook = torch.linspace(-1, 1, 16)
    layer = Linear4bit.from_linear(nn.Linear(64, 8), codebook=codebook)
    expected = F4.dequantize_4bit(F4.quantize_4bit(torch.randn(1, 64), codebook=codebook)).shape
    assert expected == (1, 64)
    error = (layer.half().dequantize(torch.float32) - layer.dequantize(torch.float32)).abs().max()
    assert error == 0
    assert torch.equal(layer.codebook, codebook)
    with pytest.raises(QuantizationError, match="needs a codebook"):
        Linear4bit(64, 8, quant_type="custom")


def test_module_refuses_what_it_cannot_be() -> None:
    with pytest.raises(QuantizationError, match="unknown"):
        Linear4bit(64, 8, quant_type="nf5")
    with pytest.raises(QuantizationError, match="block_size 16"):
        Linear4bit(64, 8, block_size=16)
    with pytest.raises(QuantizationError, match="cannot be initialised"):
        Linear4bit(64, 8).reset_parameters()
    linear = nn.Linear(64, 8)
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(QuantizationError, match=r"fc\.weight of shape \[8, 64\] has nan at \[0, 0\]"):
        Linear4bit.from_linear(linear, name="fc.weight")


def test_repr_tells_the_format() -> None:
    expected = "Linear4bit(in_features=64, out_features=8, bias=False, nf4, block_size=64, double_quant)"
    assert repr(Linear4bit(64, 8, bias=False)) == expected


def test_parts_need_not_be_contiguous(implementation: str) -> None:
    q = weight(64, 96, False)
    spread = torch.empty(len(q.codes), 2, dtype=torch.uint8)[:, 0].copy_(q.codes)
    scales = torch.empty(len(q.absmax), 2)[:, 0].copy_(q.absmax)
    x, grad = torch.randn(20, 96), torch.randn(20, 64)
    rest = (None, None, q.codebook, q.block_size)
    got = torch.ops.fourbit.linear_4bit(x, spread, scales, *rest, 64, None)
    assert torch.equal(got, F4.linear_4bit(x, q))
    got = torch.ops.fourbit.linear_4bit_backward(grad, spread, scales, *rest, 96)
    assert torch.equal(got, F4.linear_4bit_grad(grad, q))
