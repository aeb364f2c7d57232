"""Codec, dropout, norm and gate in plain torch: the definitions that every kernel is tested against.

Quantizing (QLoRA, arXiv:2305.14314, section 3). The tensor is flattened and cut into blocks of
`block_size` values; for a block w in fp32

    absmax = max |w|,    y = w * (1 / absmax),    code = index of the codebook value nearest to y

The last block, where it is short, divides instead: y = w / absmax. That is bitsandbytes' CPU code, and
codes have to be its bytes. A tie goes to the lower value. An absmax below 1e-38 counts as 1e-38 in the
division only, so that a zero block has codes of zero and absmax zero.

Restoring: fp32(codebook[code]) * absmax, rounded once to the wanted dtype.

Double quantization (section 3): the mean of the scales, `offset`, is taken off, and what remains is
quantized in blocks of 256 to the nearest value of an 8-bit map:

    r = absmax - offset,    nested_absmax = max |r|,    y = r / nested_absmax
    restored = map[code8] * nested_absmax + offset      (fp32, two roundings)

Everything here runs on any device, in pieces of bounded size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fourbit.codebooks import dynamic_map, dynamic_thresholds, thresholds
from fourbit.tensor import NESTED_BLOCK_SIZE

# Values handled at once: a multiple of every block size, so that only the last piece has a short block.
_PIECE = 1 << 22
_SMALLEST = 1e-38
# Scales summed by one halving tree in the mean of double quantization.
_SUM_CHUNK = 4096


def quantize_4bit(w: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize w, of any shape and floating dtype, with n values in b = ceil(n / block_size) blocks.

    Returns codes uint8 [ceil(n / 2)], the first of two in the high nibble (an odd end is filled with
    the code of zero), and absmax fp32 [b]. A block with NaN or infinity gets a non-finite absmax.
    """
    pieces = w.detach().reshape(-1).split(_PIECE)
    parts = [_quantize_piece(piece.float(), codebook, block_size) for piece in pieces]
    return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])


def _quantize_piece(w: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    full = w.numel() - w.numel() % block_size
    blocks, tail = w[:full].view(-1, block_size), w[full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(1)).view(-1)
    if tail.numel():
        tail_absmax = tail.abs().amax().view(1)
        absmax = torch.cat([absmax, tail_absmax])
        scaled = torch.cat([scaled, tail / tail_absmax.clamp(min=_SMALLEST)])
    scaled = F.pad(scaled.clamp(-1, 1), (0, scaled.numel() % 2))
    bounds, order = thresholds(codebook)
    codes = order[torch.bucketize(scaled, bounds)]  # the number of thresholds strictly below
    return (codes[::2] << 4) | codes[1::2], absmax


def find_nonfinite(w: Tensor) -> int:
    """Flat position of the first NaN or infinity of w, or -1."""
    for number, piece in enumerate(w.reshape(-1).split(_PIECE)):
        wrong = ~piece.isfinite()
        if wrong.any():
            return number * _PIECE + int(wrong.to(torch.uint8).argmax())
    return -1


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, ...],
    codebook: Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Restore a tensor of `shape` and `dtype` from codes uint8 [ceil(n / 2)] and absmax fp32 [b]."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    flat = out.view(-1)
    for start in range(0, flat.numel(), _PIECE):
        target = flat[start : start + _PIECE]
        bytes_ = codes[start // 2 : (start + target.numel() + 1) // 2]
        index = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).view(-1)[: target.numel()]
        scales = absmax[start // block_size :][: -(-target.numel() // block_size)]
        target.copy_(codebook[index.int()] * scales.repeat_interleave(block_size)[: target.numel()])
    return out


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization of absmax fp32 [b].

    Returns codes8 uint8 [b], nested_absmax fp32 [ceil(b / 256)], offset fp32 [] (the mean). Each code
    is the nearest of the 256 values to y, without exception; ties go to the lower value.
    """
    offset = (_sum(absmax) / max(1, absmax.numel())).float()
    residual = F.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = residual.abs().amax(dim=1)
    scaled = residual / nested_absmax.clamp(min=_SMALLEST).unsqueeze(1)
    codes8 = torch.bucketize(scaled, dynamic_thresholds(absmax.device))
    return codes8.to(torch.uint8).view(-1)[: absmax.numel()], nested_absmax, offset


def _sum(values: Tensor) -> Tensor:
    """Sum in fp64 in an order that no device or thread count changes.

    The values, padded with zeros to whole chunks of 4096, are summed chunk by chunk, each by adding
    its second half to its first until one value is left; the chunk sums are the values of the next
    round, and one remaining value is the sum. No values sum to 0.
    """
    values = values.double()
    while values.numel() > 1:
        values = F.pad(values, (0, -values.numel() % _SUM_CHUNK)).view(-1, _SUM_CHUNK)
        while values.shape[1] > 1:
            first, second = values.chunk(2, dim=1)
            values = first + second
        values = values.view(-1)
    return values.sum()


def dequantize_absmax(codes8: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Restore absmax fp32 [b] from double quantization."""
    scales = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes8.numel()]
    return dynamic_map(codes8.device)[codes8.int()] * scales + offset


def linear_4bit(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    out_features: int,
    codebook: Tensor,
    block_size: int,
    bias: Tensor | None,
) -> Tensor:
    """Product of x [.., K] and the restored weight [out_features, K] transposed, plus bias, in x's dtype
    (QLoRA equation 5 without the adapter).
    """
    shape = (out_features, x.shape[-1])
    return F.linear(x, dequantize_4bit(codes, absmax, shape, codebook, block_size, x.dtype), bias)


def keyed_dropout(
    x: Tensor, p: float, rows: Tensor, positions: Tensor, layer: int, seed: int, step: int
) -> Tensor:
    """Drop elements of x [T, K] at the rate p and scale the kept ones: x * mask / (1 - p).

    The rate is rounded to a multiple of 1 / 65536; the product is fp32, rounded once to x's dtype.
    Which elements are dropped depends on nothing but the keys, see `dropout_mask`; the gradient is
    the same function of the gradient.
    """
    mask = dropout_mask(p, rows, positions, x.shape[1], layer, seed, step)
    kept = torch.tensor(65536.0 - dropped_of_65536(p), dtype=torch.float32, device=x.device)
    return torch.where(mask, x.float() * (65536.0 / kept), 0.0).to(x.dtype)


def dropped_of_65536(p: float) -> int:
    """The dropout rate p in units of 1 / 65536, rounded half up."""
    return int(p * 65536 + 0.5)


def dropout_mask(
    p: float, rows: Tensor, positions: Tensor, columns: int, layer: int, seed: int, step: int
) -> Tensor:
    """Which elements are kept: bool [T, columns], for T tokens known by int64 row and position.

    Philox4x32-10 (Salmon et al., SC 2011) with counter (row, position, column // 8, layer) and key
    (low xor high half of seed, step), all modulo 2^32, gives eight 16-bit numbers, the low half of
    each word first, for eight columns; a column is dropped when its number is below 65536 p.
    """
    blocks = torch.arange(-(-columns // 8), device=rows.device)
    key = torch.tensor([(seed ^ (seed >> 32)) & _LOW32, step & _LOW32], device=rows.device)
    counter = [rows[:, None], positions[:, None], blocks, torch.tensor(layer, device=rows.device)]
    words = philox([word & _LOW32 for word in counter], key)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten(1)[:, :columns] >= dropped_of_65536(p)


_LOW32 = 0xFFFFFFFF


def philox(counter: list[Tensor], key: Tensor) -> list[Tensor]:
    """Philox4x32-10: four counter words and two key words, int64 in 0..2^32-1, to four such words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # A product may pass 2^63 and wrap; bits 0 to 63 stay right.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (second >> 32) & _LOW32 ^ c1 ^ k0, second & _LOW32
        c2, c3 = (first >> 32) & _LOW32 ^ c3 ^ k1, first & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return [c0, c1, c2, c3]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root mean square norm (arXiv:1910.07467, eq. 4) of x [T, K] with weight fp32 [K].

    Returns x s weight, fp32 rounded once to x's dtype, and s = 1 / sqrt(mean(x^2) + eps), fp32 [T].
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    return (wide * scale[:, None] * weight).to(x.dtype), scale


def rms_norm_backward(
    grads: Sequence[Tensor], passed: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> Tensor:
    """Its gradient in x: s (g w - x s^2 mean(g w x)), g the sum of grads, plus passed; rounded once."""
    wide, weighted = x.float(), sum(grad.float() for grad in grads) * weight
    along = (weighted * wide).mean(dim=-1, keepdim=True) * scale[:, None] ** 2
    grad_x = scale[:, None] * (weighted - along * wide)
    return (grad_x if passed is None else grad_x + passed.float()).to(x.dtype)


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """activation(gate) * up (arXiv:2002.05202), fp32 rounded once; kind 0 is SiLU, 1 GELU by tanh."""
    return (_activation(gate.float(), kind) * up.float()).to(gate.dtype)


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Its gradients in gate and up, each rounded once."""
    with torch.enable_grad():
        wide_gate = gate.detach().float().requires_grad_()
        wide_up = up.detach().float().requires_grad_()
        out = _activation(wide_gate, kind) * wide_up
        grads = torch.autograd.grad(out, [wide_gate, wide_up], grad.float())
    return grads[0].to(gate.dtype), grads[1].to(up.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864, eq. 34), pairs half a head apart, rounded once.

    x [B, H, T, D], cos and sin [B or 1, T, D]: x cos + (-x2, x1) sin; back: the transposed map, of gradients.
    """
    wide, cos, sin = x.float(), cos.float()[:, None], sin.float()[:, None]
    if back:
        first, second = (wide * sin).chunk(2, dim=-1)
        return (wide * cos + torch.cat([second, -first], dim=-1)).to(x.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _activation(x: Tensor, kind: int) -> Tensor:
    return F.silu(x) if kind == 0 else F.gelu(x, approximate="tanh")


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale Q K^T) V, where query t sees keys first[t] to t (arXiv:1706.03762, eq. 1).

    q [B, H, T, D], k and v [B, Hkv, T, D] with H a multiple of Hkv, first int [B, T].
    Returns o [B, H, T, D] in q's dtype and, fp32 [B, H, T], the logarithm of each softmax's denominator.
    """
    scores = _scores(q, k, first, scale)
    lse = scores.logsumexp(dim=-1)
    o = (scores - lse[..., None]).exp() @ _repeated(v, q)
    return o.to(q.dtype), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in q, k and v (arXiv:2205.14135, appendix B.2)."""
    probabilities = (_scores(q, k, first, scale) - lse[..., None]).exp()
    grad_v = probabilities.mT @ grad.float()
    inner = (grad.float() * o.float()).sum(dim=-1, keepdim=True)
    grad_scores = scale * probabilities * (grad.float() @ _repeated(v, q).mT - inner)
    grad_q, grad_k = grad_scores @ _repeated(k, q), grad_scores.mT @ q.float()
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    return (
        grad_q.to(q.dtype),
        grad_k.unflatten(1, groups).sum(dim=2).to(k.dtype),
        grad_v.unflatten(1, groups).sum(dim=2).to(v.dtype),
    )


def _scores(q: Tensor, k: Tensor, first: Tensor, scale: float) -> Tensor:
    places = torch.arange(q.shape[2], device=q.device)
    seen = (places >= first[:, :, None]) & (places <= places[:, None])  # [B, T, T]
    return (scale * q.float() @ _repeated(k, q).mT).masked_fill(~seen[:, None], -torch.inf)


def _repeated(kv: Tensor, q: Tensor) -> Tensor:
    return kv.float().repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def adamw(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, coefficients: Tensor) -> None:
    """One step of AdamW on fp32 [n], in place (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2).

    coefficients  fp32 [8] on the CPU: 1 - rate decay, b1, 1 - b1, b2, 1 - b2, 1 / sqrt(1 - b2^t), eps,
                  rate / (1 - b1^t)
    """
    decay, keep1, take1, keep2, take2, correction, eps, rate = coefficients.tolist()
    mean.copy_(mean * keep1 + grad * take1)
    square.copy_(square * keep2 + (grad * grad) * take2)
    # In fp32 torch's root is MKL's on some processors, a unit in the last place off in one value of five.
    bottom = square.double().sqrt().float() * correction + eps
    weight.copy_(weight * decay - (mean / bottom) * rate)


def adamw_8bit(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    mean_absmax: Tensor,
    square: Tensor,
    square_absmax: Tensor,
    coefficients: Tensor,
) -> None:
    """`adamw` with states of 8 bits in blocks of 256 (Dettmers et al., arXiv:2110.02861), in place.

    mean, square                uint8 [n]: codes of the signed and of the unsigned dynamic map
    mean_absmax, square_absmax  fp32 [ceil(n / 256)]

    Weights are updated from the states before they are rounded. A square that is not zero is not rounded to
    zero, since the step would then be divided by eps alone.
    """
    m = _unpack_blocks(mean, mean_absmax, dynamic_map(mean.device))
    v = _unpack_blocks(square, square_absmax, dynamic_map(square.device, signed=False))
    adamw(weight, grad, m, v, coefficients)
    _pack_blocks(m, mean, mean_absmax, dynamic_thresholds(mean.device))
    _pack_blocks(v, square, square_absmax, dynamic_thresholds(square.device, signed=False))
    square.clamp_(min=(v > 0).to(torch.uint8))


def _unpack_blocks(codes: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    return values[codes.int()] * absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]


def _pack_blocks(value: Tensor, codes: Tensor, absmax: Tensor, thresholds: Tensor) -> None:
    blocks = F.pad(value, (0, -value.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    absmax.copy_(blocks.abs().amax(dim=1))
    scaled = blocks / absmax.clamp(min=_SMALLEST).unsqueeze(1)
    codes.copy_(torch.bucketize(scaled, thresholds).view(-1)[: value.numel()])
