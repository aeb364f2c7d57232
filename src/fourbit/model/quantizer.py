"""fourbit as a transformers quantization method: Linear4bit layers, filled while weights stream in.

`FourBitConfig` says how; `FourBitQuantizer` swaps `nn.Linear` for `Linear4bit` on the meta device and
quantizes each weight the moment transformers has read it, so that a load holds at most one weight in
its original precision. Importing this module registers both under quant_method "fourbit".
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from fourbit import functional
from fourbit.errors import ConfigError, FourBitError
from fourbit.model.formats.bnb import bnb_config
from fourbit.model.formats.lazy import LazyStack, OriginalTensor
from fourbit.model.save import checkpoint_tensors, is_bnb_savable, left_unpacked
from fourbit.nn.experts import (
    STACKS,
    Experts4bit,
    experts_modules,
    pack_experts,
    quantize_stack,
)
from fourbit.nn.linear import Linear4bit, features, is_plain, is_transposed
from fourbit.nn.matrix import packed_bytes
from fourbit.nn.packed import packed_parts


@register_quantization_config("fourbit")
class FourBitConfig(QuantizationConfigMixin):
    """How a base is quantized.

    quant_type              "nf4", "fp4" or "int4"
    block_size              weights per scale
    double_quant            8-bit scales (QLoRA section 3)
    compute_dtype           dtype of matrix products; None takes the model's dtype
    modules_to_not_convert  names of linear layers and experts to leave as they are, beside the head and tied
                            weights
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        modules_to_not_convert: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = "fourbit"  # type: ignore[assignment]  # transformers' enum lists only its own
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = (
            getattr(torch, compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
        )
        self.modules_to_not_convert = modules_to_not_convert
        #: What stopped a conversion: transformers logs errors inside a load, and raises one without a reason.
        self._failure: FourBitError | None = None
        self._saved_as: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: BitsAndBytesConfig) -> FourBitConfig:
        """The same layers and bytes as bitsandbytes would make, on fourbit's kernels.

        Raises ConfigError for a configuration that is not one of 4 bits.
        """
        if not config.load_in_4bit:
            raise ConfigError("BitsAndBytesConfig: only load_in_4bit=True has a counterpart here")
        return cls(
            config.bnb_4bit_quant_type,
            64,
            config.bnb_4bit_use_double_quant,
            config.bnb_4bit_compute_dtype,
            config.llm_int8_skip_modules,
        )

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: of bitsandbytes, whose bytes these are, where it has the type."""
        if self._saved_as is not None:
            return self._saved_as
        return self.own_dict()

    def own_dict(self) -> dict[str, Any]:
        """These settings, under quant_method "fourbit"."""
        tree = {key: value for key, value in self.__dict__.items() if not key.startswith("_")}
        if isinstance(self.compute_dtype, torch.dtype):
            tree["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return tree


@register_quantizer("fourbit")
class FourBitQuantizer(HfQuantizer):
    """Builds and fills Linear4bit layers, and experts in 4 bits, inside transformers' `from_pretrained`."""

    quantization_config: FourBitConfig
    requires_calibration = False
    serialized_names: dict[str, list[str]] = {  # noqa: RUF012 - declared so by the base class
        name: [name, f"{name}_absmax", f"{name}_consts"] for name in ("weight", *STACKS)
    }

    @property
    def quantized_element_size(self) -> float:
        return 0.52

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        skipped = self.get_modules_to_not_convert(
            model,
            config.modules_to_not_convert,
            list(model._keep_in_fp32_modules or ()),
            # A saved checkpoint lists all it left out; what is quantized now also leaves out head and ties.
            add_default_skips=not self.pre_quantized,
        )
        for name in linear_names(model, skipped):
            linear = cast(nn.Linear, model.get_submodule(name))
            replacement = Linear4bit(
                *features(linear),
                bias=linear.bias is not None,
                quant_type=config.quant_type,
                block_size=config.block_size,
                double_quant=config.double_quant,
                compute_dtype=config.compute_dtype or model.dtype,
                device="meta",
                dtype=model.dtype,
            )
            # Packed it is [out, in] all the same, as with bitsandbytes.
            replacement.transposed = is_transposed(linear)
            if linear.bias is not None:
                replacement.bias = linear.bias
            if not self.pre_quantized:
                # Until 5.20 transformers casts what it reads to the dtype of the parameter it is for, and
                # quantizes then; so the parameter has the original's dtype until the weight arrives.
                replacement.weight = cast(nn.Parameter, linear.weight.requires_grad_(False))
            # transformers would draw random values for a weight that the checkpoint lacks; a missing
            # packed weight must stay missing, and be reported.
            replacement._is_hf_initialized = True  # type: ignore[assignment]  # a flag, says transformers
            model.set_submodule(name, replacement)
        for name in experts_names(model, skipped):
            experts: Any = model.get_submodule(name)
            given = {leaf: experts._parameters[leaf].requires_grad_(False) for leaf in STACKS}
            dtype = config.compute_dtype or model.dtype
            pack_experts(
                experts, config.quant_type, config.block_size, config.double_quant, dtype, model.dtype
            )
            if not self.pre_quantized:
                experts._parameters.update(given)
            experts._is_hf_initialized = True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return (isinstance(module, Linear4bit) and leaf == "weight") or (
            isinstance(module, Experts4bit) and leaf in STACKS
        )

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes: a bitsandbytes checkpoint, which any transformers loads, as far as
        it can hold the model; INT4 and experts stay under quant_method "fourbit".
        """
        config = self.quantization_config
        left = left_unpacked(model)
        if is_bnb_savable(model):
            config._saved_as = bnb_config(config.quant_type, config.double_quant, model.dtype, left)
            return checkpoint_tensors(model), {}
        config._saved_as = {**config.own_dict(), "modules_to_not_convert": left}
        # A checkpoint of the float model has other names; these bytes are saved under the model's own.
        model._weight_conversions = []  # type: ignore[assignment]  # modules take any attribute
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def linear_names(model: nn.Module, skipped: list[str]) -> list[str]:
    """The linear layers of a model that can be packed, less the skipped ones."""
    return [
        name
        for name, module in model.named_modules()
        if (is_plain(module) or is_transposed(module)) and should_convert_module(name, skipped)
    ]


def experts_names(model: nn.Module, skipped: list[str]) -> list[str]:
    """The experts modules of a model that can be packed, less the skipped ones."""
    return [name for name, _ in experts_modules(model) if should_convert_module(name, skipped)]


class _Quantize(ConversionOps):
    """One weight in, its packed parameters out."""

    def __init__(self, quantizer: FourBitQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        (name, value), *_ = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        assert model is not None
        owner, _, leaf = name.rpartition(".")
        module, config = model.get_submodule(owner), self.quantizer.quantization_config
        try:
            if isinstance(module, Experts4bit):
                parts = _quantized_stack(weight, module, leaf, name)
            else:
                weight = weight.read() if isinstance(weight, OriginalTensor) else weight
                if isinstance(module, Linear4bit) and module.transposed:
                    weight = weight.t().contiguous()
                q = functional.quantize_4bit(
                    weight, config.quant_type, config.block_size, config.double_quant, name=name
                )
                parts = packed_bytes(q)
        except FourBitError as error:
            config._failure = error
            raise
        return {name + ending: nn.Parameter(part, requires_grad=False) for ending, part in parts.items()}


def _quantized_stack(weight: Any, module: Experts4bit, leaf: str, name: str) -> dict[str, Tensor]:
    stack = module.stacks[leaf]
    if isinstance(weight, OriginalTensor) and isinstance(weight.source, LazyStack):
        source = weight.source
        matrices = (source.matrix(number) for number in range(stack.count))
        return quantize_stack(matrices, stack, name=name)
    whole = weight.read() if isinstance(weight, OriginalTensor) else weight
    matrices = (matrix.t().contiguous() if stack.transposed else matrix for matrix in whole)
    return quantize_stack(matrices, stack, whole.device, name)


def pack_skeleton(
    model: PreTrainedModel, names: set[str], quant_type: str, block: int, double: bool, dtype: torch.dtype
) -> None:
    """Make the weights of these names, of a model on the meta device, packed ones; nothing is quantized.

    dtype  of products
    """
    left = [name for name in linear_names(model, []) if f"{name}.weight" not in names]
    left += [name for name in experts_names(model, []) if f"{name}.{STACKS[0]}" not in names]
    pack_left(model, FourBitConfig(quant_type, block, double, dtype, left))


def pack_left(model: PreTrainedModel, config: FourBitConfig) -> None:
    """Make weights of a model on the meta device packed ones: all but those that the config leaves out."""
    quantizer = FourBitQuantizer(config)
    quantizer.pre_quantized = True  # packed parameters at once: no weights will arrive to be quantized
    quantizer._process_model_before_weight_loading(model)


def fill_randomly(model: nn.Module) -> None:
    """Give a model with undefined weights random ones, of a usual size: others may take other times."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.02) if tensor.ndim > 1 else tensor.fill_(1.0)
            elif tensor.dtype == torch.uint8:
                tensor.random_(0, 256)
            else:
                tensor.zero_()
        for part in packed_parts(model):  # the last scales, which are numbers in fp32
            part.scales[-1].view(torch.float32).fill_(0.02)
