"""Every Triton kernel against `fourbit.reference`, on shapes of an 8 B model and on odd ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_common import DEVICE, FLOATS, HALF, Row, named
from torch import Tensor

from fourbit import reference
from fourbit.codebooks import codebook, thresholds


def packed(shape: tuple[int, int], block_size: int = 64) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Random weights in 16 bits, their codes and their double-quantized scales, by the reference."""
    w = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).to(HALF)
    codes, absmax = reference.quantize_4bit(w, codebook("nf4", DEVICE), block_size)
    return w, codes, (absmax, *reference.quantize_absmax(absmax))


def check(tiny: bool) -> list[Callable[[], Row]]:
    large = (48, 64) if tiny else (14336, 4096)
    return [
        *(named(f"quantize {kind} {shape}", lambda kind=kind, shape=shape: check_quantize(kind, shape))
          for kind in ("nf4", "fp4", "int4") for shape in ((7, 131), large)),
        *(named(f"restore {dtype}", lambda dtype=dtype: check_restore(large, dtype))
          for dtype in FLOATS),
        *(named(f"{rows} rows", lambda rows=rows: check_product(large, rows)) for rows in (1, 5, 64, 300)),
        named("dropout", check_dropout),
        *(named(f"adamw, {bits} bits", lambda bits=bits: check_adamw(bits)) for bits in (32, 8)),
        named("cross-entropy", check_loss),
    ]  # fmt: skip


def check_quantize(kind: str, shape: tuple[int, int]) -> Row:
    from fourbit.kernels.gpu import codec

    w, values = packed(shape)[0], codebook(kind, DEVICE)
    wanted = reference.quantize_4bit(w, values, 64)
    codes = torch.empty_like(wanted[0])
    absmax = codec.quantize_4bit(w, *thresholds(values), 64, codes)
    return {"equal": torch.equal(codes, wanted[0]) and torch.equal(absmax, wanted[1])}


def check_restore(shape: tuple[int, int], dtype: torch.dtype) -> Row:
    from fourbit.kernels.gpu import codec

    _, codes, (absmax, *double) = packed(shape)
    values, equal = codebook("nf4", DEVICE), []
    for scales, parts in ((absmax, (absmax, None, None)), (reference.dequantize_absmax(*double), double)):
        out = torch.empty(shape, dtype=dtype, device=DEVICE)
        codec.dequantize_4bit(codes, *parts, values, 64, out)
        equal.append(torch.equal(out, reference.dequantize_4bit(codes, scales, shape, values, 64, dtype)))
    return {"equal": all(equal)}


def check_product(shape: tuple[int, int], rows: int) -> Row:
    from fourbit.kernels.gpu import product

    _, codes, (_, *double) = packed(shape)
    values, worst = codebook("nf4", DEVICE), 0.0
    restored = reference.dequantize_absmax(*double)
    multiply = product.linear_4bit if rows <= 64 else product.many_rows
    for dtype in FLOATS[1:]:
        weight = reference.dequantize_4bit(codes, restored, shape, values, 64, dtype)
        x = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
        truth = x.double() @ weight.double().T
        y = multiply(x, codes, *double, values, 64, shape[0], None)
        ours, theirs = ((z.double() - truth).abs().max().item() for z in (y, x @ weight.T))
        worst = max(worst, ours / max(theirs, 1e-9))
    return {"error_over_torch": worst, "equal": worst <= 1.5}


def check_dropout() -> Row:
    from fourbit.kernels.gpu import dropout

    x = torch.randn(9, 1000, device=DEVICE).to(HALF)
    rows, positions = torch.arange(9, device=DEVICE) ** 9, torch.arange(9, device=DEVICE)
    found = dropout.dropout(x, rows, positions, 2**32 - 5, 2**63 + 7, 2**31 + 3, 0.3)
    wanted = reference.keyed_dropout(x, 0.3, rows, positions, 2**32 - 5, 2**63 + 7, 2**31 + 3)
    return {"equal": torch.equal(found, wanted)}


def check_adamw(bits: int) -> Row:
    from fourbit.kernels.gpu import optimizer

    step = getattr(optimizer, "adamw" if bits == 32 else "adamw_8bit")
    wanted = getattr(reference, "adamw" if bits == 32 else "adamw_8bit")
    sizes = (1, 257, 5000)
    ours, theirs = ([states(size, bits) for size in sizes] for _ in range(2))
    for number in range(1, 4):
        numbers = coefficients(number)
        step([(*piece, numbers) for piece in ours])
        for piece in theirs:
            wanted(*piece, numbers)
    return {"equal": all(all(map(torch.equal, a, b)) for a, b in zip(ours, theirs, strict=True))}


def states(size: int, bits: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(size)
    weight, grad = torch.randn(2, size, generator=generator, device=DEVICE)
    if bits == 32:
        return weight, grad, torch.zeros_like(weight), torch.zeros_like(weight)
    codes = [torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    scales = [torch.zeros(-(-size // 256), device=DEVICE) for _ in range(2)]
    return weight, grad, codes[0], scales[0], codes[1], scales[1]


def coefficients(step: int) -> Tensor:
    return torch.tensor(
        [1.0, 0.9, 0.1, 0.999, 0.001, 1 / (1 - 0.999**step) ** 0.5, 1e-8, 1e-3 / (1 - 0.9**step)]
    )


def check_loss() -> Row:
    from fourbit.kernels.gpu import loss

    logits = 8 * torch.randn(5, 9001, device=DEVICE)
    labels = torch.arange(5, device=DEVICE) * 1800
    truth = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    wanted = logits.double().softmax(dim=1)
    wanted[torch.arange(5), labels] -= 1
    found = loss.cross_entropy(logits, labels, 1.0, None, True)
    error = max((found - truth).abs().max().item(), (logits - wanted).abs().max().item())
    return {"error": error, "equal": error < 1e-4}
