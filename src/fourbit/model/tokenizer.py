"""Tokenizers made fit for training: a pad token that exists, ids that the model has rows for."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fourbit.errors import ModelError

#: Of a model's rows, what its tokenizer has ids for at least.
_SMALLEST_SHARE = 0.5
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; raises ModelError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # every tokenizer class raises its own
        reason = " ".join(str(error).split())[:160]
        if not any(folder.glob("tokenizer*")):
            raise ModelError(
                f"{folder}: has no tokenizer; add tokenizer.json from the model's source"
            ) from None
        raise ModelError(f"{folder}: its tokenizer cannot be read ({reason}); download it again") from error
    return tokenizer


def open_tokenizer(
    path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub name or .gguf file, as `fourbit.load` would give it."""
    from fourbit.model.base import locate
    from fourbit.model.formats import gguf

    place = locate(path, revision)
    tokenizer = gguf.read_tokenizer(place) if place.is_file() else read_tokenizer(place, trust_remote_code)
    ensure_pad_token(tokenizer)
    return tokenizer


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a pad token one that it already knows, so that no row must be added.

    A padding token distinct from end-of-text is preferred; where there is none, end-of-text serves:
    labels come from the row's own mask, never from comparing with the pad id, so it is trained all the same.
    """
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    for name in (*_PAD_NAMES, tokenizer.eos_token):
        if name is not None and name in vocabulary and name != tokenizer.bos_token:
            tokenizer.pad_token = name
            return
    raise ModelError(
        "the tokenizer has no pad, end-of-text or unknown token to pad with; set tokenizer.pad_token"
    )


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Add embedding rows for tokens the model has none for, each the mean of the old rows (as QLoRA does).

    Returns how many were added; raises ModelError when tokenizer and model cannot belong together.
    """
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    # Of the ids, not the number of tokens: a vocabulary may have holes, or one token far beyond the others.
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    # Models round their rows up, to a multiple of 1024 at most.
    if not _SMALLEST_SHARE * rows <= needed <= rows + 1024:
        raise ModelError(
            f"{model.name_or_path}: the tokenizer has ids up to {needed - 1} and the model {rows} rows: "
            "they do not belong together"
        )
    if needed <= rows:
        return 0
    model.resize_token_embeddings(needed, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            weight = cast(nn.Embedding | nn.Linear, layer).weight.data
            weight[rows:] = weight[:rows].float().mean(dim=0).to(weight.dtype)
    return needed - rows
