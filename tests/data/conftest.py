"""Small tokenizers built on the spot: byte-level BPE with chosen merges, so that every token is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fourbit.config import DataSettings
from fourbit.data.row import Row
from fourbit.model.load import load_tokenizer

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|end|>",
)  # fmt: skip

#: Words that become one token, each with its first letter's neighbours: "\nok" and " yes" take the
#: white space before them, ": no" the colon too, so that answers merge with the end of their prompt.
WORDS = ("user", "assistant", "hello", "world", " yes", "\nok", ": no", "é")

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]


def _build(
    chat_template: str | None = None,
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = None,
    adds_bos: bool = False,
    trims_offsets: bool = False,
    normalizer: Any = None,
) -> PreTrainedTokenizerBase:
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        letters = byte.pre_tokenize_str(word)[0][0]
        for end in range(2, len(letters) + 1):
            merges.append((letters[: end - 1], letters[end - 1]))
            if letters[:end] not in pieces:
                pieces.append(letters[:end])
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = byte
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)] if trims_offsets else []
    if adds_bos:
        bos_id = tokenizer.token_to_id(bos)
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)]))
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=chat_template
    )


@pytest.fixture
def make_tokenizer() -> MakeTokenizer:
    return _build


@pytest.fixture
def settings() -> Callable[..., DataSettings]:
    return lambda **changes: DataSettings(train="train.jsonl", **changes)


@pytest.fixture
def row() -> Callable[..., Row]:
    return lambda line=1, **fields: Row(fields, "f.jsonl", line)


@pytest.fixture(scope="session")
def smollm2(smollm2: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's real tokenizer, out of the file that the fixture of the same name above finds."""
    return load_tokenizer(smollm2)


def _byte_spans(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[int, int]]:
    """The bytes that each token spans, counted from the tokens' own spelling and not from offsets."""
    spans, position = [], 0
    for token, index in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True):
        # A byte-level token has one letter per byte; a special token stands for its own text.
        special = index in tokenizer.added_tokens_decoder
        length = len(token.encode()) if special else len(token)
        spans.append((position, position + length))
        position += length
    return spans


@pytest.fixture
def expected() -> Callable[[PreTrainedTokenizerBase, str], tuple[list[int], list[bool]]]:
    """Ids and mask of a text whose trained parts stand between « and »."""

    def read(tokenizer: PreTrainedTokenizerBase, marked: str) -> tuple[list[int], list[bool]]:
        text, ranges, position = "", [], 0
        for part in marked.split("«"):
            answer, closed, rest = part.partition("»")
            size = len(answer.encode())
            if closed:
                ranges.append((position, position + size))
            text += answer + rest
            position += size + len(rest.encode())
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spans = _byte_spans(tokenizer, ids)
        assert spans[-1][1] == len(text.encode())
        return ids, [any(a < end and start < b for a, b in ranges) for start, end in spans]

    return read
