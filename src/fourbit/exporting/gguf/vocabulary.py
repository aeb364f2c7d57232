"""The tokenizer inside a GGUF file: tokens, their types, merges or scores, special ids, chat template.

Two kinds of vocabulary exist in practice: byte-level BPE ("gpt2" in llama.cpp) and SentencePiece's BPE
with byte fallback ("llama"). llama.cpp normalizes nothing for the first: a tokenizer that composes its
text to NFC, as Qwen's does, gives the same tokens for text that is NFC already, which nearly all is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fourbit.errors import ModelError
from fourbit.model.formats import pretokenizers

# llama.cpp's token types
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Write a fast tokenizer's metadata with a gguf.GGUFWriter.

    rows: the embedding's rows; ids without a token become unused tokens.
    Raises ModelError for a tokenizer whose tokens llama.cpp would not reproduce.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer has no tokenizer.json, which an export to GGUF needs")
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise ModelError(f"the tokenizer is of type {model['type']}; only BPE can be exported to GGUF")
    tokens, types = _tokens(tokenizer, rows)
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, description, tokens, types)
    else:
        _add_byte_level(writer, description, tokens, types)
    _add_special(writer, tokenizer)


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [_UNUSED] * rows
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        if index >= rows:
            raise ModelError(
                f"the tokenizer's token '{token}' has id {index}, but the model has {rows} embedding rows"
            )
        tokens[index], types[index] = token, _NORMAL
        if index in added:
            types[index] = _CONTROL if added[index].special else _USER_DEFINED
    return tokens, types


def _add_byte_level(writer: Any, description: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    model, normalizer = description["model"], description.get("normalizer")
    split = pretokenizers.by_description(description.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    if split is None:
        raise ModelError(
            "llama.cpp has no name for the way this tokenizer splits text before merging "
            f"({_shorten(description.get('pre_tokenizer'))}); exported, it would give other tokens"
        )
    if normalizer not in (None, {"type": "NFC"}):
        raise ModelError(
            f"the tokenizer normalizes its text ({_shorten(normalizer)}), which llama.cpp does not do"
        )
    if not model["merges"]:
        raise ModelError("the tokenizer has no merges, and llama.cpp loads no byte-level BPE without")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split.names[0])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in _merges(model)])


def _add_sentencepiece(writer: Any, description: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    model = description["model"]
    prefix = _space_prefix(description)
    normal = {
        token
        for token, kind in zip(tokens, types, strict=True)
        if kind == _NORMAL and not _BYTE_TOKEN.fullmatch(token)
    }
    scores = _scores(_merges(model), tokens, normal)
    for index, token in enumerate(tokens):
        if _BYTE_TOKEN.fullmatch(token):
            types[index] = _BYTE
        elif token == model.get("unk_token"):
            types[index] = _UNKNOWN
        elif types[index] == _USER_DEFINED:  # matched in the text itself, where spaces are spaces
            tokens[index] = token.replace(_SPACE, " ")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)


def _space_prefix(description: dict[str, Any]) -> bool:
    """Whether a space is put before the text. Raises for any other treatment of the text than spaces to ▁."""
    normalizer, splitter = description.get("normalizer"), description.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    prefix = False
    for step in [step for step in (*steps, splitter) if step is not None]:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                pass
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}:
                prefix = prefix or scheme != "never"
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}:
                pass  # Gemma's, which finds no space: the normalizer has replaced them
            case _:
                raise ModelError(
                    f"the tokenizer treats its text in a way that llama.cpp does not know ({_shorten(step)})"
                )
    return prefix


def _scores(merges: Sequence[tuple[str, str]], tokens: Sequence[str], normal: set[str]) -> list[float]:
    """A score a token, so that merging the best-scored pair first is merging in the order of `merges`.

    llama.cpp merges any two neighbours that make a token and ranks them by the token. That is what the
    list says exactly when it holds every such pair, and all pairs that make a token stand together.
    Raises ModelError otherwise.
    """
    rank: dict[str, int] = {}
    made = ""
    for left, right in merges:
        if left + right != made and left + right in rank:
            raise _not_sentencepiece(f"'{left + right}' is made at two ranks")
        made = left + right
        rank.setdefault(made, len(rank))
    known = set(merges)
    for token in normal:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in normal and pair[1] in normal and pair not in known:
                raise _not_sentencepiece(f"'{pair[0]}' and '{pair[1]}' are not merged to '{token}'")
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _not_sentencepiece(reason: str) -> ModelError:
    return ModelError(
        f"the tokenizer's merges are not those of a SentencePiece vocabulary ({reason}), "
        "and llama.cpp cannot follow others with byte fallback"
    )


def _add_special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    writers = {
        "bos_token_id": writer.add_bos_token_id,
        "eos_token_id": writer.add_eos_token_id,
        "unk_token_id": writer.add_unk_token_id,
        "sep_token_id": writer.add_sep_token_id,
        "pad_token_id": writer.add_pad_token_id,
        "mask_token_id": writer.add_mask_token_id,
    }
    for name, add in writers.items():
        index = getattr(tokenizer, name, None)
        if index is not None:
            add(index)
    before, after = _surrounding(tokenizer)
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise ModelError(
            f"the tokenizer puts the tokens {before} before and {after} after a text; "
            "llama.cpp can only add the begin- and end-of-text tokens"
        )
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _surrounding(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    # Older files hold "left right", newer ones [left, right].
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."
