"""A mixture's experts in 4 bits: transformers' fused expert weights, packed matrix by matrix.

transformers keeps the experts of a layer in two parameters, `gate_up_proj` and `down_proj`, with a matrix
for each expert. Packed, such a stack is two or three `uint8` parameters whose rows are what `Linear4bit`
would hold for that expert's matrix [out, in]:

    NAME         uint8 [E, ceil(n / 2)]       codes, n = out * in
    NAME_absmax  uint8 [E, b] or [E, 4 b]     scale codes; the bytes of fp32 scales without double_quant
    NAME_consts  uint8 [E, 4 ceil(b/256)+4]   bytes of fp32 nested_absmax, then of offset; absent without

The module keeps its class's gate, biases and names, and gets another forward: tokens are sorted by expert, so
that each expert's matrix is met once, with all rows that go through it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.codebooks import check_block_size, check_quant_type
from fourbit.functional import quantize_4bit
from fourbit.kernels.product import Adapter
from fourbit.nn.grouped import Routing, StackAdapter, grouped, sorted_rows, weighted_sum
from fourbit.nn.matrix import PackedMatrix, packed_bytes, packed_sizes
from fourbit.nn.replaced import random

#: The parameters of an experts module that are stacks of matrices, in the order in which they are used.
STACKS = ("gate_up_proj", "down_proj")
#: Sizes of the small experts on which a class is tried.
_EXPERTS, _HIDDEN, _INNER = 3, 8, 6


@dataclass(frozen=True)
class Stack:
    """How the matrices of a packed stack are held.

    count         experts
    out_features  of each matrix, [out_features, in_features]
    transposed    the model's own parameter is [count, in_features, out_features] (GPT-OSS)
    dtype         of the original weights
    """

    count: int
    out_features: int
    in_features: int
    transposed: bool
    quant_type: str
    block_size: int
    double_quant: bool
    compute_dtype: torch.dtype | None
    dtype: torch.dtype

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """The shape of the model's own parameter."""
        sides = (self.out_features, self.in_features)
        return (self.count, *(sides[::-1] if self.transposed else sides))

    def sizes(self) -> dict[str, int]:
        """Bytes for one matrix of each parameter, by the ending of its name."""
        return packed_sizes(self.out_features * self.in_features, self.block_size, self.double_quant)


class Expert(PackedMatrix):
    """One matrix of a stack; shares the stack's memory."""

    def __init__(self, module: Any, name: str, stack: Stack, number: int) -> None:
        self.out_features, self.in_features = stack.out_features, stack.in_features
        self.quant_type, self.block_size = stack.quant_type, stack.block_size
        self.double_quant, self.dtype = stack.double_quant, stack.dtype
        self.compute_dtype = stack.compute_dtype

        def part(ending: str) -> Any:
            whole = getattr(module, name + ending, None)
            return None if whole is None else whole[number]

        self.weight, self.weight_absmax = part(""), part("_absmax")
        self.weight_consts, self.bias = part("_consts"), part("_bias")

    def __call__(self, x: Tensor, adapter: Adapter | None = None) -> Any:
        return self.forward(x, adapter)


class Matrices(Sequence[PackedMatrix]):
    """The matrices of a stack by expert, each made when it is asked for: a layer may have hundreds."""

    def __init__(self, module: Any, name: str, stack: Stack) -> None:
        self._module, self._name, self.stack = module, name, stack

    def __len__(self) -> int:
        return self.stack.count

    def __getitem__(self, number: Any) -> Any:
        return Expert(self._module, self._name, self.stack, range(self.stack.count)[number])


class Experts4bit(nn.Module):
    """What a packed experts module is besides its own class (see `pack_experts`).

    stacks  by the name of the parameter
    """

    stacks: dict[str, Stack]

    def matrices(self, name: str) -> Matrices:
        """The matrices of a stack, by expert."""
        return Matrices(self, name, self.stacks[name])

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A stack as the model's own parameter, by default in its original dtype."""
        stack = self.stacks[name]
        whole = torch.empty(stack.stored_shape, dtype=dtype or stack.dtype, device=getattr(self, name).device)
        for matrix, place in zip(self.matrices(name), whole, strict=True):
            values = matrix.dequantize(dtype)
            place.copy_(values.t() if stack.transposed else values)
        return whole

    def unpacked(self, weights: dict[str, Tensor]) -> nn.Module:
        """A module of the model's own class with these stacks, as it stores them; all else is shared."""
        plain = copy(self)
        plain.__class__ = type(self).__bases__[1]
        plain._parameters = {
            name: nn.Parameter(weights[name], requires_grad=False) if name in weights else parameter
            for name, parameter in self._parameters.items()
            if not name.endswith(("_absmax", "_consts"))
        }
        del plain.stacks
        return plain

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapters: dict[str, StackAdapter] | None = None,
    ) -> Tensor:
        """As the class's own: [T, H] through experts [T, k], weighted [T, k] and summed, -> [T, H].

        adapters  of stacks, by name
        """
        adapters = adapters or {}
        device = hidden_states.device.type
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _through_experts(self, hidden_states.to(dtype), top_k_index, top_k_weights, adapters).to(
                hidden_states.dtype
            )


def _through_experts(
    module: Any, x: Tensor, index: Tensor, weights: Tensor, adapters: dict[str, StackAdapter]
) -> Tensor:
    first, second = STACKS
    rows, routing = sorted_rows(x, index, module.stacks[first].count)
    y = grouped(rows, module.matrices(first), routing.counts, adapters.get(first))
    y = module._apply_gate(_with_bias_gradient(y, module, first, index, routing))
    y = grouped(y, module.matrices(second), routing.counts, adapters.get(second))
    return weighted_sum(_with_bias_gradient(y, module, second, index, routing), routing, weights)


def _with_bias_gradient(y: Tensor, module: Any, name: str, index: Tensor, routing: Routing) -> Tensor:
    """y, through which a bias that is trained gets its gradient; the product has added its value already."""
    bias = getattr(module, f"{name}_bias", None)
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return y
    return y + (bias - bias.detach())[index.reshape(-1)[routing.order]].to(y.dtype)


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer's experts as transformers fuses them, and computes what is computed here.

    The class is tried with small experts; one that does more, or routes otherwise, is none.
    """
    if isinstance(module, Experts4bit):
        return True
    stacks = [module._parameters.get(name) for name in STACKS]
    if any(stack is None or stack.ndim != 3 for stack in stacks):
        return False
    return _is_known(module)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts modules of a model that are packed or can be, by name."""
    return ((name, module) for name, module in model.named_modules() if is_experts(module))


def pack_experts(
    module: Any,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    compute_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> None:
    """Make an experts module one of 4 bits, of undefined bytes, on the device where its weights are."""
    check_quant_type(quant_type)
    check_block_size(block_size)
    transposed = bool(module.is_transposed)
    module.stacks = {}
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in module._parameters.items():
        if name not in STACKS:
            parameters[name] = parameter
            continue
        count, rows, columns = parameter.shape
        sides = (columns, rows) if transposed else (rows, columns)
        stack = Stack(count, *sides, transposed, quant_type, block_size, double_quant, compute_dtype, dtype)
        module.stacks[name] = stack
        for ending, size in stack.sizes().items():
            data = torch.empty(count, size, dtype=torch.uint8, device=parameter.device)
            parameters[name + ending] = nn.Parameter(data, requires_grad=False)
    module._parameters = parameters
    kind: Any = type(module)
    module.__class__ = _packed_class(kind)


def quantize_stack(
    matrices: Iterable[Tensor],
    stack: Stack,
    device: torch.device | str | None = None,
    name: str | None = None,
) -> dict[str, Tensor]:
    """The packed parameters of a stack by the ending of their names, from its matrices [out, in]."""
    parts = {
        ending: torch.empty(stack.count, size, dtype=torch.uint8, device=device)
        for ending, size in stack.sizes().items()
    }
    for number, matrix in enumerate(matrices):
        q = quantize_4bit(matrix, stack.quant_type, stack.block_size, stack.double_quant, name=name)
        for ending, data in packed_bytes(q).items():
            parts[ending][number] = data
    return parts


@cache
def _packed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A class that is `Experts4bit` and, after it, the model's own."""
    return type(f"{kind.__name__}4bit", (Experts4bit, kind), {})


#: Whether modules of a class are experts of this kind, as far as it has been tried.
_TRIED: dict[type[nn.Module], bool] = {}


def _is_known(module: nn.Module) -> bool:
    """Whether small experts of this module's class compute what `_through_experts` does."""
    kind = type(module)
    if kind not in _TRIED:
        try:
            with torch.device("cpu"), torch.no_grad():
                _TRIED[kind] = _agrees(module)
        except Exception:  # a class that wants more than these experts have is another kind
            _TRIED[kind] = False
    return _TRIED[kind]


def _agrees(module: nn.Module) -> bool:
    small: Any = copy(module)
    small._parameters, small.num_experts = {}, _EXPERTS
    sides = ((2 * _INNER, _HIDDEN), (_HIDDEN, _INNER))
    weights = [random(_EXPERTS, *shape) for shape in sides]
    biases = [random(_EXPERTS, rows) * bool(small.has_bias) for rows, _ in sides]
    for name, weight, bias in zip(STACKS, weights, biases, strict=True):
        small._parameters[name] = nn.Parameter(weight.mT if small.is_transposed else weight)
        if small.has_bias:
            small._parameters[f"{name}_bias"] = nn.Parameter(bias)
    x, index = random(4, _HIDDEN), torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    shares = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
    y = torch.zeros_like(x)
    for token, place in product(range(4), range(2)):
        e = int(index[token, place])
        inner = small._apply_gate(x[token] @ weights[0][e].T + biases[0][e])
        y[token] += shares[token, place] * (inner @ weights[1][e].T + biases[1][e])
    # The class's own code, not a faster one that its settings choose.
    own = getattr(type(module).forward, "__wrapped__", type(module).forward)
    return torch.allclose(own(small, x, index, shares), y, rtol=1e-4, atol=1e-5)
