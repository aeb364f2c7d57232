"""`Linear4bit`: a frozen linear layer that keeps its weight in 4 bits (QLoRA, arXiv:2305.14314).

The packed weight is two or three flat `uint8` parameters that never take a gradient, so that casts
(`.to(torch.bfloat16)`, `.half()`) leave them alone, FSDP shards them and a state dict holds them like
any others:

    weight         uint8 [ceil(n / 2)]        codes, n = out_features * in_features
    weight_absmax  uint8 [b] or [4 b]         scale codes; the bytes of fp32 scales without double_quant
    weight_consts  uint8 [4 ceil(b/256) + 4]  bytes of fp32 nested_absmax, then of offset; None without

The bytes are bitsandbytes' and are never rewritten: what trains is what was loaded and what is saved.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fourbit.codebooks import check_block_size, check_codebook, check_quant_type
from fourbit.errors import QuantizationError
from fourbit.functional import quantize_4bit
from fourbit.nn.matrix import PackedMatrix, packed_bytes, packed_sizes
from fourbit.tensor import QuantizedTensor


class Linear4bit(PackedMatrix, nn.Linear):
    """y = x @ W.T + bias with W [out_features, in_features] frozen in 4 bits.

    compute_dtype  dtype of the product; x is cast to it and y back; None computes in x's dtype
    dtype          of the bias and of what `dequantize` returns; the weight's original one
    codebook       fp32 [16] for quant_type "custom"

    `transposed` says that the model has a Conv1D here (GPT-2), whose weight is [in_features, out_features].
    A new layer has undefined bytes, to be filled by loading or materialised from the meta device; see
    `from_linear` and `from_quantized`. The parameters are described at the top of the module.
    """

    weight: nn.Parameter
    weight_absmax: nn.Parameter
    weight_consts: nn.Parameter | None
    transposed: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        codebook: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and initialise a float weight
        check_block_size(block_size)
        if quant_type != "custom":
            check_quant_type(quant_type)
        elif codebook is None:
            raise QuantizationError("quant_type 'custom' needs a codebook; pass codebook=fp32 [16]")
        self.in_features, self.out_features = in_features, out_features
        self.quant_type, self.block_size, self.double_quant = quant_type, block_size, double_quant
        self.compute_dtype, self.dtype = compute_dtype, dtype or torch.get_default_dtype()
        # Not a buffer: casting the module would round it.
        self._custom_codebook = check_codebook(codebook) if codebook is not None else None

        sizes = packed_sizes(out_features * in_features, block_size, double_quant)
        self.weight, self.weight_absmax = _bytes(sizes[""], device), _bytes(sizes["_absmax"], device)
        consts = _bytes(sizes["_consts"], device) if double_quant else None
        self.register_parameter("weight_consts", consts)
        empty_bias = torch.empty(out_features, device=device, dtype=self.dtype)
        self.register_parameter("bias", nn.Parameter(empty_bias) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        codebook: Tensor | None = None,
        name: str | None = None,
    ) -> Linear4bit:
        """Quantize a float layer; `name` appears in errors. The bias is shared, not copied."""
        q = quantize_4bit(linear.weight, quant_type, block_size, double_quant, codebook, name)
        return cls.from_quantized(q, linear.bias, compute_dtype)

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> Linear4bit:
        """A layer on the bytes of a quantized matrix; codes are shared, not copied."""
        if len(q.shape) != 2:
            raise QuantizationError(f"a linear weight has two dimensions, this one has shape {list(q.shape)}")
        layer = cls(
            q.shape[1],
            q.shape[0],
            bias=bias is not None,
            quant_type=q.quant_type,
            block_size=q.block_size,
            double_quant=q.double_quant,
            compute_dtype=compute_dtype,
            codebook=q.codebook if q.quant_type == "custom" else None,
            device="meta",
            dtype=q.dtype,
        )
        for ending, data in packed_bytes(q).items():
            setattr(layer, f"weight{ending}", _frozen(data))
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, bias.requires_grad)
        return layer

    @property
    def W_q(self) -> nn.Parameter:
        """The packed weight under the name by which PEFT finds a layer that has `dequantize()`."""
        return self.weight

    def reset_parameters(self) -> None:
        raise QuantizationError("a 4-bit weight cannot be initialised; build the layer with from_linear")

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        text += f"bias={self.bias is not None}, {self.quant_type}, block_size={self.block_size}"
        return text + (", double_quant" if self.double_quant else "")


def _bytes(size: int, device: torch.device | str | None) -> nn.Parameter:
    return _frozen(torch.empty(size, dtype=torch.uint8, device=device))


def _frozen(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def unpacked_linear(model: nn.Module) -> list[str]:
    """The names of a model's linear layers whose weights are not packed."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, Linear4bit)
    ]


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is GPT-2's linear layer, whose weight is stored as [in, out]."""
    return type(module) is Conv1D


def as_conv1d(linear: nn.Linear) -> Conv1D:
    """GPT-2's layer that computes what this one does; weights of their own, the bias shared."""
    with torch.device("meta"):
        layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
    layer.bias = linear.bias
    return layer


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an `nn.Linear` or a `Conv1D`."""
    out_features, in_features = cast(Tensor, module.weight).shape
    return (out_features, in_features) if is_transposed(module) else (in_features, out_features)


def is_plain(module: nn.Module) -> bool:
    """Whether a layer is an `nn.Linear`, or a class of its own that computes the same, such as Falcon's."""
    kind: Any = type(module)
    return kind is nn.Linear or (isinstance(module, nn.Linear) and _computes_the_same(kind))


@cache
def _computes_the_same(kind: Any) -> bool:
    """Found out by trying a layer of this class on numbers."""
    if issubclass(kind, Linear4bit) or kind.__module__.startswith("torch."):  # their owners read the weights
        return False
    layer = kind.__new__(kind)
    try:
        # Models are made on the meta device and in other dtypes than this.
        with torch.device("cpu"), torch.no_grad():
            nn.Linear.__init__(layer, 3, 2, dtype=torch.float32)
            x = torch.linspace(-1, 1, 12, dtype=torch.float32).view(4, 3)
            return torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-5)
    except Exception:  # a class that wants more than an nn.Linear has is not one
        return False
