"""Every figure of docs/method.md that is ours, computed by fourbit's own code: python docs/claims.py

Sizes come from models built on torch's meta device (shapes without data) whose linear layers are
`Linear4bit`, so the bytes are those that a loaded model holds. Errors and entropies come from the codec
on seeded Gaussian weights. `python docs/claims.py size double` prints only the named sections; all of
them take a minute on one core and 2 GB of memory, most of it for the sections `size` and `bits`.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fourbit import functional as F4
from fourbit.codebooks import codebook
from fourbit.config import BLOCK_SIZES
from fourbit.model.adapters import add_lora, parameter_counts
from fourbit.model.formats.bnb import to_bnb
from fourbit.nn.linear import Linear4bit
from fourbit.tensor import QuantizedTensor

# (hidden, feed-forward, layers, heads) of the paper's models, LLaMA (arXiv:2302.13971, table 2).
LLAMA = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "33B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}
# Bytes per trained parameter: AdamW keeps two fp32 moments.
ADAM = 8
GB = 1e9


@dataclass(frozen=True)
class Footprint:
    """What a model holds: weights in 4 bits, the bytes of those layers, all parameters, all bytes."""

    packed: int
    packed_bytes: int
    parameters: int
    bytes: int


def llama(size: str, double_quant: bool = True) -> PreTrainedModel:
    """A LLaMA on the meta device with its layers in NF4."""
    hidden, feed_forward, layers, heads = LLAMA[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32_000,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, packed_like(child, double_quant))
    return model.requires_grad_(False)


def packed_like(linear: nn.Linear, double_quant: bool) -> Linear4bit:
    """A 4-bit layer of the same shape, without data."""
    shape = linear.in_features, linear.out_features
    return Linear4bit(*shape, bias=False, double_quant=double_quant, device="meta", dtype=torch.bfloat16)


@cache
def footprint(size: str, double_quant: bool = True) -> Footprint:
    """The figures of one LLaMA."""
    model = llama(size, double_quant)
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    return Footprint(
        packed=sum(layer.in_features * layer.out_features for layer in packed),
        packed_bytes=sum(p.nbytes for layer in packed for p in layer.parameters()),
        parameters=parameter_counts(model)[1],
        bytes=sum(p.nbytes for p in model.parameters()),
    )


@cache
def lora_parameters(size: str, r: int) -> tuple[int, ...]:
    """Elements of each LoRA matrix on all linear layers."""
    return tuple(p.numel() for p in add_lora(llama(size), r=r).parameters() if p.requires_grad)


def size() -> None:
    """4, 8 or 16 times smaller; 780 GB to 48 GB."""
    row("", "in 4 bits", "all", "fp32 GB", "16-bit GB", "NF4 GB", "fp32/NF4", "16-bit/NF4", "bits, all")
    for name in LLAMA:
        model = footprint(name)
        n, now = model.parameters, model.bytes
        figures = (4 * n / GB, 2 * n / GB, now / GB, 4 * n / now, 2 * n / now, 8 * now / n)
        row(name, f"{model.packed:,}", f"{n:,}", *(f"{figure:.2f}" for figure in figures))
    model = footprint("7B")
    against = [width * model.packed / model.packed_bytes for width in (4, 2)]
    bits_held = 8 * model.packed_bytes / model.packed
    print(
        f"linear layers alone: {bits_held:.3f} bits, fp32/NF4 {against[0]:.2f}, 16-bit/NF4 {against[1]:.2f}\n"
    )

    print("training, in GB, activations not counted: weights + gradients + AdamW's two fp32 moments")
    row("", "full, 16-bit", "+ fp32 master", "QLoRA r 64", "QLoRA r 16", "full/QLoRA 64")
    for name in LLAMA:
        n, base = footprint(name).parameters, footprint(name).bytes / GB
        full = n * (2 + 2 + ADAM) / GB
        qlora = {r: base + sum(lora_parameters(name, r)) * (4 + 4 + ADAM) / GB for r in (16, 64)}
        costs = (full, full + 4 * n / GB, qlora[64], qlora[16], full / qlora[64])
        row(name, *(f"{cost:.1f}" for cost in costs))
    hidden, feed_forward, layers, _ = LLAMA["65B"]
    print(f"65B, layer inputs of one row of 512 tokens in bf16: {2 * 512 * hidden * layers / GB:.2f} GB")
    print(f"65B, one restored matrix in bf16: {2 * hidden * feed_forward / GB:.2f} GB")


def double() -> None:
    """Double quantization: what it saves, what it costs, and what it leaves alone."""
    for name in LLAMA:
        before = footprint(name, False).bytes
        saved = before - footprint(name).bytes
        print(f"{name}: saves {saved / GB:.2f} GB of {before / GB:.2f} ({100 * saved / before:.1f} %)")
    ratios, scale_mean, scale_max, same = [], [], [], True
    for seed in range(3):
        w = gaussian(1024, 1024, seed=seed)
        once, twice = F4.quantize_4bit(w), F4.quantize_4bit(w, double_quant=True)
        ratios.append((mean_error(w, twice) / mean_error(w, once)).item())
        relative = (F4.absmax_of(twice) - once.absmax).abs() / once.absmax
        scale_mean.append(relative.mean().item())
        scale_max.append(relative.max().item())
        same &= torch.equal(once.codes, twice.codes)
    print(f"4-bit codes with and without it equal: {same}")
    print(f"mean absolute error with / without: {', '.join(f'{ratio:.4f}' for ratio in ratios)} (3 seeds)")
    print(f"relative error of the scales: mean {max(scale_mean):.4f}, largest {max(scale_max):.4f}")


def bits() -> None:
    """Bits per weight, from the bytes of a saved file."""
    w = gaussian(4096, 11008, seed=0).bfloat16()
    for double_quant in (True, False):
        q = F4.quantize_4bit(w, double_quant=double_quant)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save_file(to_bnb("weight", q), str(file))
            saved = 8 * file.stat().st_size / w.numel()
        what = "double-quantized" if double_quant else "plain"
        print(f"4096 x 11008 {what}: {q.bits_per_weight:.6f} held, {saved:.6f} in a saved file")
    small = gaussian(1024, 4096, seed=0)
    row("block size", *BLOCK_SIZES)
    for double_quant in (False, True):
        quantized = [F4.quantize_4bit(small, block_size=b, double_quant=double_quant) for b in BLOCK_SIZES]
        row("double" if double_quant else "plain", *(f"{q.bits_per_weight:.4f}" for q in quantized))


def nf4() -> None:
    """NF4: its construction, how often each code is used, and how good it is."""
    probabilities = torch.arange(17, dtype=torch.float64) / 17
    literal = (torch.special.ndtri(probabilities[0]) + torch.special.ndtri(probabilities[1])) / 2
    print(f"equation 4 taken literally, q_0 = {literal.item()}")
    difference = (constructed_nf4() - codebook("nf4")).abs().max()
    print(f"NF4 from its construction in fp64 and as implemented differ by at most {difference:.1e}")

    w = gaussian(1 << 16, 64, seed=0)
    q = F4.quantize_4bit(w)
    counts = torch.bincount(torch.stack([q.codes >> 4, q.codes & 15], dim=1).flatten().int(), minlength=16)
    share = counts.double() / counts.sum()
    print("use of the 16 codes by Gaussian weights, in %:", " ".join(f"{100 * part:.2f}" for part in share))
    print(f"entropy {-(share * share.log2()).sum():.3f} bits of 4; equal use would be 6.25 % each")

    row("Gaussian, block 64", "mean |error|", "mean square", "signal/noise dB")
    fitted = fit_codebook(w)
    quantized = {name: F4.quantize_4bit(w, name) for name in ("nf4", "int4", "fp4")}
    quantized["fitted"] = F4.quantize_4bit(w, codebook=fitted)
    for name, q in quantized.items():
        error = F4.dequantize_4bit(q) - w
        square, ratio = error.square().mean(), (w.square().mean() / error.square().mean()).log10()
        row(name, f"{error.abs().mean():.5f}", f"{square:.5f}", f"{10 * ratio:.2f}")
    print("the fitted codebook:", " ".join(f"{value:.4f}" for value in fitted.tolist()))


def gradients() -> None:
    """What gradients pass through and what they reach."""
    w, x = gaussian(256, 512, seed=0) / 20, gaussian(32, 512, seed=1).requires_grad_()
    layer = Linear4bit.from_quantized(F4.quantize_4bit(w, double_quant=True))
    before = [parameter.clone() for parameter in layer.parameters()]
    target = gaussian(32, 256, seed=2)
    (layer(x) * target).sum().backward()
    assert x.grad is not None
    truth = target.double() @ layer.dequantize(torch.float32).double()
    error = ((x.grad - truth).norm() / truth.norm()).item()
    print(f"relative error of the input's gradient against fp64: {error:.1e}")
    print("its parameters that take a gradient:", sum(p.requires_grad for p in layer.parameters()))
    same = all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    print("bytes of the layer unchanged:", same)
    unquantized = target.double() @ w.double()
    distance = ((x.grad - unquantized).norm() / unquantized.norm()).item()
    print(f"distance to the gradient of the unquantized weight: {distance:.3f}")


def rank() -> None:
    """What the rank costs, and whether optimizer states need paging."""
    row("", "r", "trainable", "% of all", "with AdamW GB", "AdamW GB", ">= 100,000")
    for name in ("7B", "65B"):
        total = footprint(name).parameters
        for r in (8, 16, 64, 256):
            sizes = lora_parameters(name, r)
            count, large = sum(sizes), sum(n >= 100_000 for n in sizes)
            costs = (100 * count / (total + count), (4 + 4 + ADAM) * count / GB, ADAM * count / GB)
            row(name, r, f"{count:,}", *(f"{cost:.2f}" for cost in costs), f"{large} of {len(sizes)}")


def quality() -> None:
    """5-shot MMLU of QLoRA's table 4: what the paper itself says about the loss of quality."""
    tables = {
        "16-bit": (38.4, 45.6, 47.2, 50.6, 57.7, 60.5, 61.8, 62.5),
        "FP4": (37.2, 44.0, 47.3, 50.0, 55.9, 58.5, 61.3, 63.3),
        "NF4+DQ": (39.0, 44.5, 47.5, 50.7, 57.3, 59.2, 61.8, 63.9),
    }
    for name, scores in tables.items():
        change = [now - then for now, then in zip(scores, tables["16-bit"], strict=True)]
        worst = min(100 * c / then for c, then in zip(change, tables["16-bit"], strict=True))
        mean, average = sum(scores) / len(scores), sum(change) / len(change)
        span = f"{min(change):+.1f} to {max(change):+.1f} points, worst {worst:+.1f} %"
        print(f"{name}: mean {mean:.2f}, against 16-bit {average:+.2f} on average, {span}")


def gaussian(*shape: int, seed: int) -> Tensor:
    """N(0, 1) in fp32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_error(w: Tensor, q: QuantizedTensor) -> Tensor:
    """Mean absolute error of a round trip."""
    return (F4.dequantize_4bit(q) - w).abs().mean()


def constructed_nf4() -> Tensor:
    """The 16 values as section 2 of method.md constructs them."""
    top = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
    positive = torch.special.ndtri(torch.linspace(top, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(top, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    return values / values.max()


def fit_codebook(w: Tensor) -> Tensor:
    """A codebook of lower mean square error on w [blocks, 64]: Lloyd's iteration, ends and zero kept.

    An error counts with the square of its block's absmax, as it does in the restored weights.
    """
    absmax = w.abs().amax(dim=1, keepdim=True)
    scaled, weight = (w / absmax).flatten(), absmax.square().expand_as(w).flatten()
    values = codebook("nf4").clone()
    fixed = torch.tensor([0, 7, 15])
    for _ in range(60):
        nearest = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)
        sums = torch.zeros(2, 16, dtype=torch.float64)
        sums[0].index_add_(0, nearest, (scaled * weight).double())
        sums[1].index_add_(0, nearest, weight.double())
        values = (sums[0] / sums[1]).float()
        values[fixed] = codebook("nf4")[fixed]
    return values


def row(first: object, *cells: object) -> None:
    """One line of a table on a terminal."""
    print(f"{first!s:<20}" + "".join(f"{cell!s:>16}" for cell in cells))


SECTIONS = {section.__name__: section for section in (size, double, bits, nf4, gradients, rank, quality)}


def main(names: list[str]) -> int:
    """Print the named sections, or all."""
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        print(f"no section '{unknown[0]}'; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    for name in names or SECTIONS:
        print(f"== {name}: {SECTIONS[name].__doc__}")
        SECTIONS[name]()
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
