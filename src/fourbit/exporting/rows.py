"""The rows that an export is judged on: those that its run held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fourbit.config import RunConfig
from fourbit.data.encode import encode, sample, split_rows
from fourbit.data.read import read_rows
from fourbit.data.render import Example
from fourbit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def heldout_examples(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, files: Sequence[str] = (), count: int | None = None
) -> list[Example]:
    """`count` held-out rows drawn by seed: of these files, else of data.heldout, else those the run held out.

    Raises ConfigError if the run held none out, DataError for rows that cannot be read or rendered.
    """
    named = files or config.data.heldout
    if named:
        heldout = encode(read_rows(named, config.data), tokenizer, config.data).examples
    else:
        examples = encode(read_rows(config.data.train, config.data), tokenizer, config.data).examples
        _, heldout = split_rows(examples, config.data.heldout_fraction, config.train.seed)  # as in training
    if not heldout:
        raise ConfigError("no rows were held out (data.heldout_fraction is 0); give --data FILE")
    return list(heldout) if count is None else sample(heldout, count, config.train.seed)
