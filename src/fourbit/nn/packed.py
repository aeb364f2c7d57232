"""Everything of a model that is kept in 4 bits: linear layers, and stacks of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from fourbit.nn.experts import Experts4bit
from fourbit.nn.linear import Linear4bit
from fourbit.nn.matrix import PackedMatrix


@dataclass(frozen=True)
class PackedPart:
    """A packed weight of a model.

    name    of the parameter that holds its codes, which the plain model has as a float weight
    module  that has it
    codes   uint8
    scales  uint8, two or one
    count   matrices; 1 for a linear layer
    shape   (out_features, in_features) of each
    """

    name: str
    module: nn.Module
    codes: nn.Parameter
    scales: tuple[nn.Parameter, ...]
    count: int
    shape: tuple[int, int]

    @property
    def weights(self) -> int:
        """How many weights all matrices have."""
        return self.count * self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + sum(part.nbytes for part in self.scales)

    def matrices(self) -> Sequence[PackedMatrix]:
        if isinstance(self.module, Linear4bit):
            return [self.module]
        assert isinstance(self.module, Experts4bit)
        return self.module.matrices(self.name.rpartition(".")[2])


def packed_parts(model: nn.Module) -> Iterator[PackedPart]:
    """The packed weights of a model, in the order of its modules."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, Linear4bit):
            shape = (module.out_features, module.in_features)
            yield _part(prefix + "weight", module, 1, shape)
        elif isinstance(module, Experts4bit):
            for leaf, stack in module.stacks.items():
                shape = (stack.out_features, stack.in_features)
                yield _part(prefix + leaf, module, stack.count, shape)


def _part(name: str, module: nn.Module, count: int, shape: tuple[int, int]) -> PackedPart:
    leaf = name.rpartition(".")[2]
    parts = (module._parameters.get(leaf + ending) for ending in ("_absmax", "_consts"))
    codes = module._parameters[leaf]
    assert codes is not None
    return PackedPart(name, module, codes, tuple(part for part in parts if part is not None), count, shape)
