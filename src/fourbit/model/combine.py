"""Combining adapters: PEFT's `add_weighted_adapter`, layer by layer and without the base.

With weights w_i and the adapters' changes D_i = s_i B_i A_i (s_i: scaling), the methods aim at sum w_i D_i:

    cat              exactly: the factors side by side; the ranks add up
    svd              the nearest matrix of the wanted rank (Eckart and Young); exact if that is enough
    linear           A = sum sqrt(w_i s_i) A_i, and B alike: cheap, but products of A_i and B_j come in
    ties             TIES (Yadav et al., arXiv:2306.01708): the smallest entries pruned, signs elected
    dare_linear      DARE (Yu et al., arXiv:2311.03099): entries dropped at random, the rest rescaled
    dare_ties        entries dropped at random, then signs elected
    magnitude_prune  the smallest entries pruned, then summed

The last four act on A and B each as `linear` does; with `_svd` behind the name they act on the D_i, and
the result is brought to the wanted rank.

PEFT 0.21 does the arithmetic. What it gets wrong is refused or mended here: it keeps rsLoRA in the result's
settings (which scales the result by sqrt(r)), writes one rank for layers of different ranks (which does not
load again), and loses DoRA's magnitudes, biases and modules saved whole.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from fourbit.errors import ModelError
from fourbit.model.adapter_folder import Adapter, LoraFactors, rank_of, read_adapter, write_adapter
from fourbit.model.combinable import Method, check_adapters, check_method
from fourbit.private import owner_only

#: A second layer of the stand-in model, so that every adapter has one even where it lacks the first.
_LAYER, _ANCHOR = "layer", "anchor"


@dataclass(frozen=True, slots=True)
class Combination:
    """What came out.

    deviation  norm of (result - sum w_i D_i) over norm of sum w_i D_i, over all layers: 0 is exact, and
               what pruning methods leave out on purpose counts too
    """

    folder: Path
    combination_type: str
    rank: int
    layers: int
    parameters: int
    deviation: float


@owner_only()
def combine(
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    output: str | os.PathLike[str],
    combination_type: str = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    same_base: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Combination:
    """Write the weighted combination of LoRA adapters of one base as an ordinary PEFT adapter, in fp32.

    adapters              folders and their weights, which may be negative
    rank                  of the result, for methods ending in svd; by default the largest of the inputs
    density               share of entries kept, above 0 and at most 1, for ties, dare and magnitude_prune
    majority_sign_method  "total" or "frequency", for ties
    seed                  of what dare drops
    same_base             the adapters name different bases that are one model all the same
    progress              called with layers done and layers there are

    All layers get the largest rank, filled up with zeros, so that readers without rank patterns agree.
    The arithmetic runs in fp32 on the CPU, on one layer at a time; no base is loaded.

    Raises ConfigError for settings that do not go together, ModelError for adapters that cannot be combined
    and for an output folder that is in use.
    """
    method = Method(combination_type, rank, density, majority_sign_method)
    check_method(method, len(adapters))
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target}: exists already; remove it or give another output")
    read = [read_adapter(Path(folder)) for folder, _ in adapters]
    weights = [float(weight) for _, weight in adapters]
    check_adapters(read, method, same_base)
    names = list(dict.fromkeys(name for adapter in read for name in adapter.layers))
    method = Method(combination_type, rank or _largest(read), density, majority_sign_method)
    results: dict[str, LoraFactors] = {}
    error = total = 0.0
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="The density .* no pruning will be performed")
        torch.manual_seed(seed)
        for done, name in enumerate(names, start=1):
            layers = [_in_fp32(adapter.layers.get(name)) for adapter in read]
            result = _combine_layer(layers, weights, method)
            results[name] = result
            layer_error, layer_total = _squared_norms(result, layers, weights)
            error, total = error + layer_error, total + layer_total
            if progress is not None:
                progress(done, len(names))
    width = rank_of(results.values())
    write_adapter(target, _result_config(read, width), {n: _padded(r, width) for n, r in results.items()})
    return Combination(
        folder=target,
        combination_type=combination_type,
        rank=width,
        layers=len(results),
        parameters=sum(width * (layer.a.shape[1] + layer.b.shape[0]) for layer in results.values()),
        deviation=(error / total) ** 0.5 if total else 0.0,
    )


def _combine_layer(
    layers: Sequence[LoraFactors | None], weights: Sequence[float], method: Method
) -> LoraFactors:
    """The combined factors of one layer, with scaling 1; an adapter that lacks the layer has None."""
    present = [(layer, weight) for layer, weight in zip(layers, weights, strict=True) if layer is not None]
    if method.combination_type == "svd":
        a, b = _nearest_of_rank(present, method.rank or 1)
    else:
        a, b = _by_peft(layers, weights, method)
    if method.combination_type == "cat":
        a, b = (
            part.narrow(axis, 0, sum(layer.rank for layer, _ in present)) for axis, part in ((0, a), (1, b))
        )
    return LoraFactors(a, b, 1.0, present[0][0].embedding)


def _nearest_of_rank(present: Sequence[tuple[LoraFactors, float]], rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of the nearest matrix to sum w s B A, as PEFT splits it.

    From the factors, whose ranks add up to k: with B = Q_b R_b and A^T = Q_a R_a the singular values are
    those of R_b R_a^T, k x k. PEFT decomposes the out x in product, which takes minutes on a large layer.
    """
    a = torch.cat([layer.a for layer, _ in present]).double()
    b = torch.cat([layer.b * (weight * layer.scaling) for layer, weight in present], dim=1).double()
    left, left_core = torch.linalg.qr(b)
    right, right_core = torch.linalg.qr(a.t())
    u, s, vh = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    return (vh[:rank] @ right.t()).float(), (left @ u[:, :rank] * s[:rank]).float()


def _by_peft(
    layers: Sequence[LoraFactors | None], weights: Sequence[float], method: Method
) -> tuple[Tensor, Tensor]:
    """PEFT's own combination, on a model of this one layer."""
    shape = next((layer.b.shape[0], layer.a.shape[1]) for layer in layers if layer is not None)
    some_rank = next(layer.rank for layer in layers if layer is not None)
    model: PeftModel | None = None
    for number, layer in enumerate(layers):
        config = LoraConfig(
            r=layer.rank if layer is not None else some_rank,
            target_modules=[_LAYER, _ANCHOR] if layer is not None else [_ANCHOR],
            init_lora_weights=False,
        )
        if model is None:
            model = get_peft_model(_stand_in(shape), config, adapter_name=str(number))
        else:
            model.add_adapter(str(number), config)
        if layer is not None:
            tuner: Any = model.get_submodule(f"base_model.model.{_LAYER}")
            tuner.lora_A[str(number)].weight.data = layer.a
            tuner.lora_B[str(number)].weight.data = layer.b
            tuner.scaling[str(number)] = layer.scaling
    assert model is not None
    model.add_weighted_adapter(  # of the tuner that PeftModel wraps
        [str(number) for number in range(len(layers))],
        list(weights),
        "result",
        combination_type=method.combination_type,
        svd_rank=method.rank,
        svd_full_matrices=False,
        density=method.density,
        majority_sign_method=method.majority_sign_method,
    )
    tuner = model.get_submodule(f"base_model.model.{_LAYER}")
    return tuner.lora_A["result"].weight.data, tuner.lora_B["result"].weight.data


def _stand_in(shape: tuple[int, int]) -> nn.Module:
    """A model of two linear layers, the first [out, in] with a weight that takes no memory."""
    model = nn.Module()
    layer = nn.Linear(1, 1, bias=False)
    layer.out_features, layer.in_features = shape
    layer.weight = nn.Parameter(torch.zeros(1, 1).expand(shape), requires_grad=False)
    model.add_module(_LAYER, layer)
    model.add_module(_ANCHOR, nn.Linear(1, 1, bias=False))
    return model


def _result_config(adapters: Sequence[Adapter], rank: int) -> dict[str, Any]:
    """The first adapter's settings with scaling 1 and the layers of all."""
    config = dict(adapters[0].config)
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config |= {"inference_mode": True, "init_lora_weights": True}
    names = {frozenset(adapter.layers) for adapter in adapters}
    if len(names) > 1:
        config["target_modules"] = sorted(frozenset.union(*names))
        config |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return config


def _squared_norms(
    result: LoraFactors, layers: Sequence[LoraFactors | None], weights: Sequence[float]
) -> tuple[float, float]:
    """|result - sum w D|^2 and |sum w D|^2 in Frobenius norm, from the factors."""
    a = [layer.a.double() for layer in layers if layer is not None]
    b = [
        layer.b.double() * (weight * layer.scaling)
        for layer, weight in zip(layers, weights, strict=True)
        if layer is not None
    ]
    wanted = _squared_norm(torch.cat(a), torch.cat(b, dim=1))
    a, b = [*a, result.a.double()], [*b, -result.b.double()]
    return _squared_norm(torch.cat(a), torch.cat(b, dim=1)), wanted


def _squared_norm(a: Tensor, b: Tensor) -> float:
    """|B A|^2 = tr((B^T B) (A A^T)), without the product itself; rounding must not make it negative."""
    return max(0.0, float(((b.t() @ b) * (a @ a.t())).sum()))


def _padded(layer: LoraFactors, rank: int) -> LoraFactors:
    more = rank - layer.rank
    return LoraFactors(F.pad(layer.a, (0, 0, 0, more)), F.pad(layer.b, (0, more)), 1.0, layer.embedding)


def _in_fp32(layer: LoraFactors | None) -> LoraFactors | None:
    if layer is None:
        return None
    return LoraFactors(layer.a.float(), layer.b.float(), layer.scaling, layer.embedding)


def _largest(adapters: Sequence[Adapter]) -> int:
    return max(rank_of(adapter.layers.values()) for adapter in adapters)
