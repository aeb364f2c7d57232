"""What a model says at each token of the answers: its loss there, and the token it finds likeliest.

Both come out of one forward pass over the row, with the answer given. The likeliest tokens equal the
answer's own at every position exactly when greedy decoding would write the answer, so they tell exact
matches without generating.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.data.examples import lengths_of
from fourbit.data.render import Example

#: Of one forward pass, in fp32.
_LOGIT_BYTES = 256 * 2**20

#: Called with rows scored so far and rows there are.
RowProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RowScore:
    """loss: nats summed over the trained tokens; top1: the likeliest token id in the place of each."""

    loss: float
    top1: tuple[int, ...]


def score_rows(
    model: nn.Module, examples: Sequence[Example], progress: RowProgress | None = None
) -> list[RowScore]:
    """Score rows with a transformers causal LM, or a PEFT model around one, by its own logits."""
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    device = next(whole.parameters()).device
    # Most models compute logits at chosen positions only, where they are asked to.
    selects = "logits_to_keep" in signature(base.forward).parameters
    vocabulary = base.get_output_embeddings().weight.shape[0]
    scores: dict[int, RowScore] = {}
    with torch.no_grad():
        for indices in _batches(examples, max(1, _LOGIT_BYTES // (4 * vocabulary))):
            batch = [examples[index] for index in indices]
            ids, mask = _padded(batch)
            places = sorted({place for example in batch for place in _places(example)})
            kept = {"logits_to_keep": torch.tensor(places, device=device)} if selects else {}
            logits = whole(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **kept
            ).logits
            column = {place: number for number, place in enumerate(places)} if selects else None
            for index, example, row in zip(indices, batch, logits, strict=True):
                scores[index] = _score(row, example, column)
            if progress is not None:
                progress(len(scores), len(examples))
    return [scores[index] for index in range(len(examples))]


def answer_ids(example: Example) -> list[int]:
    """The trained tokens of a row, in order."""
    return [token for token, trained in zip(example.input_ids, example.trained, strict=True) if trained]


def _score(logits: Tensor, example: Example, column: dict[int, int] | None) -> RowScore:
    """logits [P, V], of which `column` says where a position's stand (None: in their own place)."""
    places = _places(example)
    taken = logits[[column[place] for place in places] if column is not None else places].float()
    targets = torch.tensor(answer_ids(example), device=taken.device)
    losses = torch.logsumexp(taken, dim=-1) - taken.gather(1, targets[:, None]).squeeze(1)
    return RowScore(float(losses.double().sum()), tuple(taken.argmax(dim=-1).tolist()))


def _places(example: Example) -> list[int]:
    """Positions whose logits predict a trained token: the one before each."""
    return [place - 1 for place, trained in enumerate(example.trained) if trained]


def _batches(examples: Sequence[Example], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length and at most so many padded tokens, the longest rows first."""
    lengths = lengths_of(examples)
    order = sorted(range(len(examples)), key=lambda index: -lengths[index])
    while order:
        size = max(1, tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def _padded(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, int64 [B, T], padded on the right with an id that the mask hides."""
    length = max(len(example.input_ids) for example in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(batch):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        mask[row, : len(example.input_ids)] = 1
    return ids, mask
