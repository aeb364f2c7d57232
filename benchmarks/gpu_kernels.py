"""Each Triton kernel's time against its own bound on this card."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from gpu_check import coefficients, packed, states
from gpu_common import DEVICE, HALF, Row, named, seconds
from torch import Tensor

from fourbit.codebooks import codebook, thresholds

#: Of a Llama of 8 B: queries, keys or values, gate or up, down.
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
MANY = ("restore and multiply", "fused")


def kernels(tiny: bool) -> list[Callable[[], Row]]:
    shape = (48, 64) if tiny else (14336, 4096)
    bound = bound_of(tiny)
    # Liger's kernels do not run under Triton's interpreter.
    liger = DEVICE.type == "cuda" and find_spec("liger_kernel") is not None
    passes = ("transformers", "Liger") if liger else ("transformers",)
    return [
        named("bandwidth and matrix rate", bound.row),
        named("quantize", lambda: time_codec(shape, bound, "quantize")),
        named("restore", lambda: time_codec(shape, bound, "restore")),
        *(named(f"{rows} rows", lambda rows=rows: time_product(shape, rows, bound)) for rows in (1, 16, 64)),
        *(
            named(f"many rows {each}: {how}", lambda each=each, how=how: time_many(each, how, tiny, bound))
            for each in ([shape] if tiny else SHAPES)
            for how in MANY
        ),
        *(named(f"adamw, {bits} bits", lambda bits=bits: time_adamw(bits, tiny, bound)) for bits in (32, 8)),
        named("cross-entropy", lambda: time_loss(tiny, bound)),
        *(
            named(f"{what}: {how}", lambda what=what, how=how: time_pass(what, how, tiny, bound))
            for what in ("RMS norm", "gated activation")
            for how in passes
        ),
    ]


class Bound:
    """What this card can do: bytes and operations a second, measured once."""

    def __init__(self, tiny: bool) -> None:
        self._size = 1 << (10 if tiny else 28)
        self._side = 64 if tiny else 8192
        self._bandwidth = self._rate = 0.0

    @property
    def bandwidth(self) -> float:
        if not self._bandwidth:
            source = torch.ones(self._size, device=DEVICE)
            target = torch.empty_like(source)
            self._bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))
        return self._bandwidth

    @property
    def rate(self) -> float:
        if not self._rate:
            dtype = HALF
            a, b = (torch.randn(self._side, self._side, device=DEVICE, dtype=dtype) for _ in range(2))
            self._rate = 2 * self._side**3 / seconds(lambda: a @ b)
        return self._rate

    def row(self) -> Row:
        return {"gb_per_s": self.bandwidth / 1e9, "tflop_per_s": self.rate / 1e12}

    def share(self, taken: float, nbytes: float) -> Row:
        """How much of the bandwidth a call of so many bytes reaches."""
        return {"ms": 1000 * taken, "share_of_bandwidth": nbytes / taken / self.bandwidth}


@cache
def bound_of(tiny: bool) -> Bound:
    return Bound(tiny)


def time_codec(shape: tuple[int, int], bound: Bound, what: str) -> Row:
    from fourbit.kernels.gpu import codec

    w, codes, (absmax, *double) = packed(shape)
    values = codebook("nf4", DEVICE)
    small = codes.nbytes + (absmax.nbytes if what == "quantize" else sum(part.nbytes for part in double))
    bounds, out = thresholds(values), torch.empty_like(w)
    if what == "quantize":
        taken = seconds(lambda: codec.quantize_4bit(w, *bounds, 64, codes))
    else:
        taken = seconds(lambda: codec.dequantize_4bit(codes, *double, values, 64, out))
    row = bound.share(taken, w.nbytes + small)
    if find_spec("bitsandbytes") and DEVICE.type == "cuda":
        import bitsandbytes.functional as peer

        theirs, state = peer.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
        if what == "quantize":
            other = seconds(lambda: peer.quantize_4bit(w, quant_type="nf4", blocksize=64))
        else:
            other = seconds(lambda: peer.dequantize_4bit(theirs, state))
        row["times_bitsandbytes"] = other / taken
    return row


def time_product(shape: tuple[int, int], rows: int, bound: Bound) -> Row:
    """Several copies in turn, so that none is found in the card's cache."""
    from fourbit.kernels.gpu import product

    w, codes, (_, *double) = packed(shape)
    values = codebook("nf4", DEVICE)
    copies = [(codes.clone(), [part.clone() for part in double]) for _ in range(8)]
    x = torch.randn(rows, shape[1], device=DEVICE).to(HALF)

    def sweep() -> None:
        for these, parts in copies:
            product.linear_4bit(x, these, *parts, values, 64, shape[0], None)

    taken = seconds(sweep) / len(copies)
    row = bound.share(taken, codes.nbytes + sum(part.nbytes for part in double))
    row["times_16_bit"] = seconds(lambda: x @ w.T) / taken
    return row


def time_many(shape: tuple[int, int], how: str, tiny: bool, bound: Bound) -> Row:
    """The faster of these belongs into `ops/linear.py`."""
    from fourbit.kernels.gpu import codec, product

    rows = 64 if tiny else 4096
    w, codes, (_, *double) = packed(shape)
    values, out = codebook("nf4", DEVICE), torch.empty_like(w)
    x = torch.randn(rows, shape[1], device=DEVICE).to(HALF)

    def restore_and_multiply() -> Tensor:
        codec.dequantize_4bit(codes, *double, values, 64, out)
        return x @ out.T

    def fused() -> Tensor:
        return product.many_rows(x, codes, *double, values, 64, shape[0], None)

    taken = seconds(fused if how == "fused" else restore_and_multiply)
    return {"ms": 1000 * taken, "share_of_rate": 2 * rows * shape[0] * shape[1] / taken / bound.rate}


def time_adamw(bits: int, tiny: bool, bound: Bound) -> Row:
    from fourbit.kernels.gpu import optimizer

    step = getattr(optimizer, "adamw" if bits == 32 else "adamw_8bit")
    size, count = (300, 3) if tiny else (65536, 448)  # an adapter of r = 16 has so many of about this size
    pieces = [(*states(size, bits), coefficients(1)) for _ in range(count)]
    taken = seconds(lambda: step(pieces))
    moved = count * size * (28 if bits == 32 else 16)
    return bound.share(taken, moved)


def time_loss(tiny: bool, bound: Bound) -> Row:
    from fourbit.kernels.gpu import loss

    rows, words = (4, 259) if tiny else (1024, 128256)
    logits = torch.randn(rows, words, device=DEVICE).to(HALF)
    labels = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    taken = seconds(lambda: loss.cross_entropy(logits, labels, 1.0, None, True))
    return bound.share(taken, 3 * logits.nbytes)


def time_pass(what: str, how: str, tiny: bool, bound: Bound) -> Row:
    """What a card runs by transformers' own code, forward and backward; are Liger's worth a dependency?"""
    norm = what == "RMS norm"
    rows, width = (8, 64) if tiny else (4096, 4096 if norm else 14336)
    x, more = (torch.randn(rows, width, device=DEVICE).to(HALF).requires_grad_() for _ in range(2))
    inputs, grad = (x,) if norm else (x, more), torch.randn_like(x)
    call = (liger_pass if how == "Liger" else plain_pass)(norm, width)
    taken = seconds(lambda: torch.autograd.grad(call(*inputs), inputs, grad))
    # Reads and writes of one pass each way.
    return bound.share(taken, (2 + 3 if norm else 3 + 5) * x.nbytes)


def plain_pass(norm: bool, width: int) -> Callable[..., Tensor]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    if norm:
        return LlamaRMSNorm(width).to(DEVICE, HALF).requires_grad_(False)
    return lambda gate, up: torch.nn.functional.silu(gate) * up


def liger_pass(norm: bool, width: int) -> Callable[..., Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    weight = torch.ones(width, device=DEVICE, dtype=HALF)
    if norm:
        return lambda x: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)
    return LigerSiLUMulFunction.apply
