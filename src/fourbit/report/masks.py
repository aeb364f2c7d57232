"""Rows as the model sees them in training: tokens, and which of them are trained."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

from fourbit.config import RunConfig
from fourbit.data.encode import encode
from fourbit.data.read import iter_rows
from fourbit.model.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class MaskedRow:
    """One row: where it stands, its tokens as text with whether each is trained, and how many are."""

    source: str
    tokens: list[tuple[str, bool]]
    trained: int


def masked_rows(config: RunConfig, count: int) -> list[MaskedRow]:
    """The first rows of a run's training files, tokenised and masked as the run did.

    Raises DataError or ModelError where the files, or the model's tokenizer, are no longer there.
    """
    rows = list(islice(iter_rows(config.data.train, config.data), count))
    model = config.model
    tokenizer = load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    found = []
    for example in encode(rows, tokenizer, config.data).examples[:count]:
        pairs = list(zip(example.input_ids, example.trained, strict=True))
        found.append(MaskedRow(example.source, _readable(tokenizer, pairs), sum(example.trained)))
    return found


def _readable(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[int, bool]]) -> list[tuple[str, bool]]:
    """Each token's text; tokens that hold parts of one character are shown together."""
    found: list[tuple[str, bool]] = []
    for trained, group in groupby(pairs, key=lambda pair: pair[1]):
        waiting: list[int] = []
        for token, _ in group:
            waiting.append(token)
            text = _text(tokenizer, waiting)
            if not text.endswith("\ufffd") or len(waiting) == 4:
                found.append((text, trained))
                waiting = []
        if waiting:
            found.append((_text(tokenizer, waiting), trained))
    return found


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
