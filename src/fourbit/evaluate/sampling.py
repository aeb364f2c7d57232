"""How the next token is drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most likely one.

    top_k  only among the k most likely (0: all)
    top_p  only among the most likely that together have this probability (Holtzman et al., arXiv:1904.09751)
    min_p  only among those at least this share as likely as the likeliest (Nguyen et al., arXiv:2407.01082)
    repetition_penalty  above 1: tokens that the prompt or the answer holds become less likely, their logits
                        divided by it where positive and multiplied where negative (Keskar et al.,
                        arXiv:1909.05858); also at temperature 0
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}, must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}, must be 0 (off) or more")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}, must be from 0 (off) to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}, must be above 0 (1: off)")


GREEDY = Sampling()


def next_tokens(
    logits: Tensor,
    sampling: Sampling,
    draws: Sequence[random.Random | None],
    seen: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """One token for each row of logits [B, V]; rows whose generator is None get any.

    seen: prompt and answer so far of each row, needed for a repetition penalty.
    """
    if sampling.repetition_penalty != 1.0:
        assert seen is not None
        logits = _penalised(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    scaled = logits.float() / sampling.temperature
    most = min(sampling.top_k or scaled.shape[-1], scaled.shape[-1])
    values, tokens = scaled.topk(most)  # sorted, the most likely first
    probabilities = values.softmax(dim=-1).double()
    cumulative = probabilities.cumsum(dim=-1)
    # The token that crosses top_p still belongs to those kept, so the first always does.
    kept = cumulative - probabilities < sampling.top_p
    kept &= probabilities >= sampling.min_p * probabilities[:, :1]
    total = (probabilities * kept).sum(dim=-1)
    uniform = [draw.random() if draw is not None else 0.0 for draw in draws]
    wanted = torch.tensor(uniform, dtype=torch.float64, device=logits.device) * total
    chosen = torch.searchsorted(cumulative, wanted[:, None], right=True)
    chosen = chosen.clamp(max=kept.sum(dim=-1, keepdim=True) - 1)
    return tokens.gather(1, chosen).squeeze(1).tolist()


def _penalised(logits: Tensor, penalty: float, seen: Sequence[Sequence[int]]) -> Tensor:
    changed = logits.float().clone()
    for row, ids in enumerate(seen):
        places = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=logits.device)
        found = changed[row, places]
        changed[row, places] = torch.where(found > 0, found / penalty, found * penalty)
    return changed
