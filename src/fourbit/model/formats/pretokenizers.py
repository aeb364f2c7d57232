"""How byte-level BPE vocabularies split text before merging, by the names that GGUF files use.

A GGUF file names its split (`tokenizer.ggml.pre`), a tokenizer.json spells it out. Both directions live
here: reading rebuilds the split from the name, writing finds the name of a split. An unknown one is an
error in both: tokens that differ in places no one looks at are the worst of all exports.

Source of the names: llama.cpp, src/llama-vocab.cpp. Names that share a split there are listed together,
the one that is written first. `ignore_merges` (a word that is a token is that token, whatever the merges
say) belongs to the name as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

_GPT2 = "byte-level"  # the split that ByteLevel(use_regex=True) does itself
_DIGITS = "digits, then byte-level"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Split:
    """One way to split: its names, the first of which is written, and what stands in a tokenizer.json."""

    names: tuple[str, ...]
    pattern: str
    ignore_merges: bool = False


_SPLITS = (
    Split(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), _GPT2),
    Split(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    Split(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3, True),
    Split(("smaug-bpe", "dbrx"), _LLAMA3),
    Split(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), _QWEN2),
    Split(("tekken",), _TEKKEN, True),
)


def by_name(name: str) -> Split | None:
    """The split of a GGUF name, or None for one that is not known."""
    return next((split for split in _SPLITS if name in split.names), None)


def by_description(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> Split | None:
    """The split that a tokenizer.json describes (its `pre_tokenizer`), or None for one without a name."""
    pattern = _pattern(pre_tokenizer)
    found = (split for split in _SPLITS if split.pattern == pattern and split.ignore_merges == ignore_merges)
    return next(found, None)


def build(split: Split) -> Any:
    """The split as a pre-tokenizer of the tokenizers library."""
    if split.pattern == _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split.pattern == _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    isolated = pre_tokenizers.Split(Regex(split.pattern), behavior="isolated")
    return pre_tokenizers.Sequence(
        [isolated, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def apply(split: Split, backend: Tokenizer) -> None:
    """Make a tokenizer byte-level BPE with this split, whatever a version of transformers took it for."""
    backend.pre_tokenizer = build(split)
    backend.decoder = decoders.ByteLevel()
    if json.loads(backend.to_str())["normalizer"] == {"type": "Sequence", "normalizers": []}:
        backend.normalizer = None
    model: Any = backend.model
    model.ignore_merges, model.byte_fallback, model.fuse_unk, model.unk_token = (
        split.ignore_merges,
        False,
        False,
        None,
    )


def _pattern(description: dict[str, Any] | None) -> str | None:
    parts = [description] if description is not None else []
    while len(parts) == 1 and parts[0]["type"] == "Sequence":
        parts = parts[0]["pretokenizers"]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    match parts[:-1], parts[-1].get("use_regex", True):
        case [], True:
            return _GPT2
        case [{"type": "Digits", "individual_digits": True}], True:
            return _DIGITS
        case [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": pattern}], False:
            return str(pattern.get("Regex"))
    return None
