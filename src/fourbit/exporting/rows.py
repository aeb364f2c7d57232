"""The rows that an export is judged on: those that its run held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fourbit.config import RunConfig
from fourbit.data.cache import encode_files
from fourbit.data.encode import sample, split_rows
from fourbit.data.render import Example
from fourbit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def heldout_examples(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, files: Sequence[str] = (), count: int | None = None
) -> Sequence[Example]:
    """`count` held-out rows drawn by seed: of these files, else of data.heldout, else those the run held out.

    Raises ConfigError if the run held none out, DataError for rows that cannot be read or rendered.
    """
    named = files or config.data.heldout
    if named:
        heldout = encode_files(named, tokenizer, config.data)[0].examples
    else:
        examples = encode_files(config.data.train, tokenizer, config.data)[0].examples
        _, heldout = split_rows(examples, config.data.heldout_fraction, config.train.seed)  # as in training
    if not heldout:
        raise ConfigError("no rows were held out (data.heldout_fraction is 0); give --data FILE")
    return heldout if count is None else sample(heldout, count, config.train.seed)
