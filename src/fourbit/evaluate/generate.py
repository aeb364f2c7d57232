"""Generated answers, many at once or one streamed.

A row that has finished leaves the batch and takes its part of the KV cache with it, so that a batch never
waits for its longest answer. Greedy answers are the model's own `generate` token by token; sampled ones
depend on the seed and the prompt's index, not on what else is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fourbit.evaluate.context import Context, Progress, inference, prefill, transformers_model
from fourbit.evaluate.labels import end_of_turn
from fourbit.evaluate.prompt_cache import PromptCache
from fourbit.evaluate.sampling import GREEDY, Sampling, next_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Shrinking the cache copies it, so rows leave once an eighth of the batch has finished.
_LEAVING = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """ids: without the token that ended it; stopped: whether one did, rather than the length limit."""

    ids: list[int]
    stopped: bool


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop: Collection[int],
    max_new_tokens: int,
    *,
    batch_size: int = 32,
    sampling: Sampling = GREEDY,
    go_on: Callable[[int, list[int]], bool] | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Answers to token-id prompts, in their order.

    stop      ids that end an answer (see `stop_ids`)
    go_on     asked after each token with the prompt's index and the answer so far; False ends it
    progress  called with (answers done, prompts)
    """
    answers: list[Answer | None] = [None] * len(prompts)
    done = 0
    with inference(model):
        for indices, context in prefill(model, prompts, batch_size):
            for index, answer in answer_batch(
                context, indices, stop, max_new_tokens, sampling=sampling, go_on=go_on, prompts=prompts
            ):
                answers[index] = answer
                done += 1
                if progress is not None:
                    progress(done, len(prompts))
    return [answer for answer in answers if answer is not None]


def answer_batch(
    context: Context,
    indices: Sequence[int],
    stop: Collection[int],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    go_on: Callable[[int, list[int]], bool] | None = None,
    prompts: Sequence[Sequence[int]] = (),
) -> Iterator[tuple[int, Answer]]:
    """The answers of one prefilled batch, as they finish; consumes the context (fork it to keep it).

    indices: of the context's rows among all prompts; prompts: all of them, needed for a repetition penalty.
    To be iterated under `inference(model)`.
    """
    answers: dict[int, list[int]] = {index: [] for index in indices}
    draws = {index: random.Random(f"{sampling.seed}/{index}") for index in indices}
    rows: list[int | None] = list(indices)  # of the context; None where the answer has finished
    logits = context.logits
    while True:
        row_draws = [draws[index] if index is not None else None for index in rows]
        seen = None
        if sampling.repetition_penalty != 1.0:
            seen = [[*prompts[i], *answers[i]] if i is not None else [] for i in rows]
        tokens = next_tokens(logits, sampling, row_draws, seen)
        for row, (index, token) in enumerate(zip(rows, tokens, strict=True)):
            if index is None:
                continue
            ids = answers[index]
            stopped = token in stop
            if not stopped:
                ids.append(token)
            if stopped or len(ids) >= max_new_tokens or (go_on is not None and not go_on(index, ids)):
                rows[row] = None
                yield index, Answer(ids, stopped)
        live = [row for row, index in enumerate(rows) if index is not None]
        if not live:
            return
        if (len(rows) - len(live)) * _LEAVING >= len(rows):
            context.select(torch.tensor(live, device=logits.device))
            rows, tokens = [rows[row] for row in live], [tokens[row] for row in live]
        ids_tensor = torch.tensor(tokens, device=logits.device)[:, None]
        logits = context.extend(ids_tensor, context.lengths[:, None], last=1)[:, -1]


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    stop: Collection[int],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    cache: PromptCache | None = None,
    draw: random.Random | None = None,
) -> Generator[str, None, Answer]:
    """One answer in pieces of text as they are written, then, as the generator's value, the answer.

    A piece never ends inside a character.

    cache  what this model with this adapter has read already; afterwards prompt and answer are in it
    draw   the random numbers of sampling; by default those of `generate` for a first prompt
    """
    text, ids, stopped = TextPieces(tokenizer), list(prompt), False
    cache = cache if cache is not None else PromptCache()
    draw = draw if draw is not None else random.Random(f"{sampling.seed}/0")
    for _ in range(max_new_tokens):
        # Entered anew for each token: a generator would carry inference mode out to its caller.
        with inference(model):
            (token,) = next_tokens(cache.read(model, ids), sampling, [draw], [ids])
        if token in stop:
            stopped = True
            break
        ids.append(token)
        if piece := text.add(token):
            yield piece
    if piece := text.rest():
        yield piece
    return Answer(ids[len(prompt) :], stopped)


class TextPieces:
    """Token ids to text, piece by piece.

    A character may be spread over several tokens and decodes to U+FFFD until it is whole, and a token's
    text may depend on the one before it (a leading space); so tokens are decoded together with those of
    the piece before, and only what is new is given out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._given = 0  # ids before _given were given out; decoding begins at _start

    def add(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self._ids.append(token)
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._give(text)

    def rest(self) -> str:
        """What is left at the end, whole or not."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        before = decode(self._tokenizer, self._ids[self._start : self._given])
        return decode(self._tokenizer, self._ids[self._start :])[len(before) :]

    def _give(self, text: str) -> str:
        self._start, self._given = self._given, len(self._ids)
        return text


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer: special tokens left out, spaces as they are."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends an answer, for the generation config, config, tokenizer or chat template."""
    base = transformers_model(model)
    found: set[int] = {end_of_turn(tokenizer)}
    for source in (getattr(base, "generation_config", None), base.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [ids] if ids is not None else [])
    return frozenset(found)
