"""llama.cpp as an independent reader of .gguf files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from fourbit.data.render import Example
from fourbit.exporting.gguf.llama_cpp import LlamaCppReader
from fourbit.exporting.scoring import RowProgress, RowScore
from fourbit.model.formats import gguf

#: The Python binding of llama.cpp.
PACKAGE = "xllamacpp"


def is_lora(file: Path) -> bool:
    """Whether a GGUF file holds an adapter alone. Raises ModelError for a damaged file."""
    return gguf.read_metadata(file, "general.type") == "adapter"


class LlamaCpp:
    """A GGUF model, perhaps with a LoRA file on it; a `readers.Reader`. Rows have up to `context` tokens."""

    def __init__(self, path: Path, lora: Path | None, context: int) -> None:
        self.name = f"llama.cpp ({PACKAGE} {version(PACKAGE)})"
        self.chat_template = gguf.read_metadata(path, "tokenizer.chat_template")
        self._reader = LlamaCppReader(path, lora=lora, context=context)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._reader.tokenize(text) for text in texts]

    def score(self, examples: Sequence[Example], progress: RowProgress | None = None) -> list[RowScore]:
        rows = [(example.input_ids, example.trained) for example in examples]
        return [
            RowScore(-sum(token.log_probability for token in row), tuple(token.top1 for token in row))
            for row in self._reader.score_all(rows, progress)
        ]

    def close(self) -> None:
        self._reader.close()
