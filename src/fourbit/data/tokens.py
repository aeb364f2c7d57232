"""Token ids with the characters that each token covers.

A mask over characters becomes a mask over tokens only if the tokens are those of the whole text, so
texts are tokenised once, whole, and the mask is carried over by offsets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fourbit.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """ids and offsets [T]: token t covers the characters offsets[t][0] up to offsets[t][1]."""

    ids: list[int]
    offsets: list[Span]

    def within(self, spans: list[Span]) -> list[bool]:
        """Which tokens hold a character of a span."""
        return [any(start < b and end > a for a, b in spans) for start, end in self.offsets]


class TextTokenizer:
    """Tokenises whole texts without adding special tokens, and tells which ones the model's own call adds.

    Raises DataError for a tokenizer that keeps no offsets (those not backed by the `tokenizers` package).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} keeps no character offsets, so answers cannot be "
                "masked exactly; load it with use_fast=True"
            )
        self._tokenizer = tokenizer
        self._untrimmed = _without_trimming(tokenizer.backend_tokenizer)

    def __call__(self, texts: list[str]) -> list[Tokens]:
        """Raises DataError where a pattern of the tokenizer does not come to an end with one of the texts."""
        try:
            return self._tokens(texts)
        except BaseException as error:
            # How the Rust library says that its limit of steps was reached; no subclass of Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"{self._tokenizer.name_or_path}: the tokenizer breaks off ({error}); use another model's"
            ) from None

    def _tokens(self, texts: list[str]) -> list[Tokens]:
        if self._untrimmed is not None:
            encodings = self._untrimmed.encode_batch(texts, add_special_tokens=False)
            return [Tokens(encoding.ids, encoding.offsets) for encoding in encodings]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [Tokens(*pair) for pair in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids (a bos token, usually) that the tokenizer itself puts before a text."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a text; raises DataError where the tokenizer has none."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has no eos token, so the model could not learn to stop; set tokenizer.eos_token"
        )
    return end


def _without_trimming(backend: Tokenizer) -> Tokenizer | None:
    """A copy of the tokenizer that keeps white space in its offsets, or None where it does anyway.

    Byte-level post-processors may trim offsets: a token of a space and a word then claims the word alone,
    and a token of a space claims nothing. Post-processing does nothing else to a text without special tokens.
    """
    state = json.loads(backend.post_processor.__getstate__()) if backend.post_processor is not None else {}
    steps = state.get("processors", [state])
    if not any(step.get("trim_offsets") for step in steps):
        return None
    copy: Tokenizer = type(backend).from_str(backend.to_str())
    copy.post_processor = None
    copy.no_padding()
    copy.no_truncation()
    return copy
