"""AdamW whose states are kept in pages, in 32 or 8 bits, in memory or beyond it: the same weights either way.

bitsandbytes pages states too, by CUDA's unified memory, and only those of tensors with 100,000 elements or
more, which LoRA's mostly have not. Here every state is in a page, tensors sharing one as they fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import ConfigError, TrainingError
from fourbit.ops import optimizer as ops
from fourbit.optim.pages import BUFFERS, Pages

#: Weights whose states share a page: 1 MiB of 32-bit states.
PAGE_WEIGHTS = 1 << 17
#: Weights that share a scale of 8-bit states (arXiv:2110.02861 takes 2048, bitsandbytes 256).
BLOCK = 256

#: Bytes of the states of one block of weights.
_BLOCK_BYTES = {32: 8 * BLOCK, 8: 2 * BLOCK + 8}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Names of all states that a parameter may have.
STATES = ("step", "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")

#: Gives a state of a parameter by its name, or None where there is none.
FindState = Callable[[nn.Parameter, str], Tensor | None]


@dataclass(frozen=True)
class _Segment:
    """Weights start to end of a parameter, whose states begin at `place`, in weights, of their page."""

    parameter: nn.Parameter
    start: int
    end: int
    place: int


class PagedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), in fp32 whatever the parameters' dtype.

    bits    32, or 8 for blockwise dynamic quantization of both states (arXiv:2110.02861)
    memory  bytes of states that stay on the parameters' device between steps; None: all of them. The rest is
            in a file (parameters on a CPU) or in pinned host memory (on a GPU) and moves while steps compute.
    folder  where that file is made; it has no name and ends with the process

    A step gives the same bytes under every budget and number of threads. Raises ConfigError for parameters
    that are no contiguous floats or lie on several devices, TrainingError where the disk is full.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bits: int = 32,
        memory: int | None = None,
        folder: Path | None = None,
    ) -> None:
        if bits not in _BLOCK_BYTES:
            raise ConfigError(f"bits {bits}: AdamW's states have 32 or 8")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._bits = bits
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        _check(parameters)
        self._steps: dict[nn.Parameter, int] = dict.fromkeys(parameters, 0)
        self._layout = _lay_out(parameters)
        sizes = [_blocks(page[-1]) * _BLOCK_BYTES[bits] for page in self._layout]
        self.pages = Pages(sizes, parameters[0].device, memory, folder)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but before the first step only: pages are laid out once."""
        if hasattr(self, "pages"):
            raise ConfigError("parameters cannot be added to a PagedAdamW; make another one")
        super().add_param_group(param_group)

    def set_memory(self, memory: int | None) -> None:
        """Keep so many bytes of states on the device from now on; None: all. Between steps."""
        self.pages.set_memory(memory)

    def close(self) -> None:
        """Give up the states, and what they take anywhere."""
        self.pages.close()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        coefficients: dict[nn.Parameter, Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._steps[parameter] += 1
                    coefficients[parameter] = _coefficients(group, self._steps[parameter])
        wanted = {
            number
            for number, page in enumerate(self._layout)
            if any(segment.parameter in coefficients for segment in page)
        }
        # In one launch what is there, unless 16-bit weights need copies, which are of a page at a time.
        whole = all(parameter.dtype == torch.float32 for parameter in coefficients)
        together = self.pages.resident(wanted) if whole else {}
        if together:
            self._update(together, coefficients)
        for number, page in self.pages.sweep(wanted - together.keys(), write=True):
            self._update({number: page}, coefficients)
        return loss

    def _update(self, pages: dict[int, Tensor], coefficients: dict[nn.Parameter, Tensor]) -> None:
        weights, pieces = [], []
        placed = [(segment, page) for number, page in pages.items() for segment in self._layout[number]]
        for segment, page in placed:
            parameter = segment.parameter
            if parameter not in coefficients:
                continue
            assert parameter.grad is not None
            weight = parameter.view(-1)[segment.start : segment.end]
            grad = parameter.grad.contiguous().view(-1)[segment.start : segment.end]
            states = self._states(segment, page).values()
            weights.append(weight)
            # An fp32 tensor's float() is itself.
            pieces.append((weight.float(), grad.float(), *states, coefficients[parameter]))
        (ops.adamw if self._bits == 32 else ops.adamw_8bit)(pieces)
        for weight, piece in zip(weights, pieces, strict=True):
            if piece[0] is not weight:
                weight.copy_(piece[0])

    def _states(self, segment: _Segment, page: Tensor) -> dict[str, Tensor]:
        """The states of a segment by name, as views of its page."""
        weights = page.numel() // _BLOCK_BYTES[self._bits] * BLOCK
        count, place = segment.end - segment.start, segment.place
        if self._bits == 32:
            both = page.view(torch.float32)
            return {
                "exp_avg": both[place : place + count],
                "exp_avg_sq": both[weights + place : weights + place + count],
            }
        scales = page[2 * weights :].view(torch.float32)
        first, blocks = place // BLOCK, -(-count // BLOCK)
        return {
            "exp_avg": page[place : place + count],
            "exp_avg_absmax": scales[first : first + blocks],
            "exp_avg_sq": page[weights + place : weights + place + count],
            "exp_avg_sq_absmax": scales[weights // BLOCK + first : weights // BLOCK + first + blocks],
        }

    def read_states(self) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
        """(parameter, name, value) of every state that a step was applied to, one after another.

        Names are `step` (int64 []), `exp_avg` and `exp_avg_sq`, shaped as the parameter (uint8 [numel] with 8
        bits), and with 8 bits their `_absmax`, fp32 [ceil(numel / 256)].
        """
        parts: dict[str, list[Tensor]] = {}
        wanted = {
            number for number, page in enumerate(self._layout) if any(self._steps[s.parameter] for s in page)
        }
        for number, page in self.pages.sweep(wanted, write=False):
            for segment in self._layout[number]:
                parameter = segment.parameter
                if not self._steps[parameter]:
                    continue
                for name, value in self._states(segment, page).items():
                    parts.setdefault(name, []).append(value.clone())
                if segment.end == parameter.numel():
                    yield parameter, "step", torch.tensor(self._steps[parameter])
                    for name, values in parts.items():
                        whole = torch.cat(values)
                        yield parameter, name, whole.view(parameter.shape) if self._bits == 32 else whole
                    parts = {}

    def write_states(self, find: FindState) -> None:
        """Take back what `read_states` gave; None for a parameter's `step` means that it had none.

        Raises TrainingError where a value has another size or type than it should.
        """
        found: dict[str, Tensor] = {}
        for number, page in self.pages.sweep(range(len(self._layout)), write=True):
            for segment in self._layout[number]:
                parameter = segment.parameter
                states = self._states(segment, page)
                if segment.start == 0:
                    step = find(parameter, "step")
                    self._steps[parameter] = 0 if step is None else int(step)
                    found = {} if step is None else self._found(parameter, states, find)
                for name, value in states.items():
                    divisor = BLOCK if name.endswith("_absmax") else 1
                    start = segment.start // divisor
                    value.zero_() if name not in found else value.copy_(
                        found[name][start : start + len(value)]
                    )

    def _found(
        self,
        parameter: nn.Parameter,
        states: dict[str, Tensor],
        find: Callable[[nn.Parameter, str], Tensor | None],
    ) -> dict[str, Tensor]:
        found = {}
        for name, like in states.items():
            value = find(parameter, name)
            count = -(-parameter.numel() // BLOCK) if name.endswith("_absmax") else parameter.numel()
            if value is None or value.numel() != count or value.dtype != like.dtype:
                kind = "missing" if value is None else f"{value.dtype} [{value.numel()}]"
                raise TrainingError(
                    f"optimizer state {name}: is {kind}, must be {like.dtype} [{count}]; it was saved by an "
                    "optimizer of another kind or for other parameters"
                )
            found[name] = value.view(-1)
        return found

    def state_dict(self) -> dict[str, Any]:
        """As torch's: all states, in memory."""
        numbers = {parameter: number for number, parameter in enumerate(self._steps)}
        state: dict[int, dict[str, Tensor]] = {}
        for parameter, name, value in self.read_states():
            state.setdefault(numbers[parameter], {})[name] = value
        groups, first = [], 0
        for group in self.param_groups:
            count = len(group["params"])
            groups.append({**group, "params": list(range(first, first + count))})
            first += count
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Raises TrainingError for states of another kind, ConfigError for other groups."""
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [
            len(group["params"]) for group in self.param_groups
        ]:
            raise ConfigError("the saved optimizer has other groups of parameters")
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        numbers = {parameter: number for number, parameter in enumerate(self._steps)}
        self.write_states(lambda parameter, name: state_dict["state"].get(numbers[parameter], {}).get(name))


def state_bytes(weights: int, bits: int, memory: int | None = None) -> tuple[int, int]:
    """(bytes of the states of so many weights beside them, during a step, and bytes elsewhere)."""
    total = -(-weights // BLOCK) * _BLOCK_BYTES[bits]
    page = PAGE_WEIGHTS // BLOCK * _BLOCK_BYTES[bits]
    resident = total if memory is None or memory >= total else memory // page * page
    moving = 0 if resident == total else min(BUFFERS * page, total)
    return resident + moving, total - resident


def _check(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.dtype not in _DTYPES or not parameter.is_contiguous():
            raise ConfigError(f"PagedAdamW takes contiguous floats in 16 or 32 bits, not {parameter.dtype}")
        if parameter.device != parameters[0].device:
            raise ConfigError(f"PagedAdamW: parameters on {parameter.device} and {parameters[0].device}")


def _lay_out(parameters: list[nn.Parameter]) -> list[list[_Segment]]:
    """Segments page by page; each begins at a multiple of a block, in its parameter and in its page."""
    pages: list[list[_Segment]] = [[]]
    place = 0
    for parameter in parameters:
        start = 0
        while start < parameter.numel():
            if place == PAGE_WEIGHTS:
                pages.append([])
                place = 0
            end = min(parameter.numel(), start + PAGE_WEIGHTS - place)
            pages[-1].append(_Segment(parameter, start, end, place))
            place += -(-(end - start) // BLOCK) * BLOCK
            start = end
    return [page for page in pages if page]


def _blocks(last: _Segment) -> int:
    """Blocks of a page, by its last segment."""
    return (last.place + last.end - last.start + BLOCK - 1) // BLOCK


def _coefficients(group: dict[str, Any], step: int) -> Tensor:
    """See `reference.adamw`; in fp64, rounded once."""
    rate, eps = float(group["lr"]), group["eps"]
    beta1, beta2 = group["betas"]
    values = (
        1 - rate * group["weight_decay"],
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / math.sqrt(1 - beta2**step),
        eps,
        rate / (1 - beta1**step),
    )
    return torch.tensor(values, dtype=torch.float64).float()
