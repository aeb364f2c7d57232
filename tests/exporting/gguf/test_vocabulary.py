"""Tokenizers inside GGUF files: llama.cpp must give the tokens that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fourbit.errors import ModelError
from fourbit.exporting.gguf.llama_cpp import LlamaCppReader
from fourbit.exporting.gguf.write import write_gguf
from fourbit.model.formats.gguf import read_tokenizer
from fourbit.model.formats.pretokenizers import by_description
from tests.exporting.gguf import models
from tests.exporting.gguf.texts import strings


def export(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model = models.model("llama", len(tokenizer))
    return write_gguf(models.lazy(model), model.config, tokenizer, folder / "tiny.gguf")


def metadata(file: Path, key: str) -> Any:
    field = gguf.GGUFReader(str(file)).get_field(key)
    return None if field is None else field.contents()


def differing(file: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    with LlamaCppReader(file, context=64, threads=1, slots=1) as reader:
        return [t for t in texts if reader.tokenize(t) != tokenizer.encode(t, add_special_tokens=False)]


def test_smollm2s_own_file_and_its_export_have_transformers_tokens(smollm2: Path, tmp_path: Path) -> None:
    texts = strings()
    assert len(set(texts)) == 1000
    tokenizer = read_tokenizer(smollm2)
    assert differing(smollm2, tokenizer, texts) == []
    exported = export(tokenizer, tmp_path)
    assert differing(exported, tokenizer, texts) == []
    files = [gguf.GGUFReader(str(file)) for file in (smollm2, exported)]  # once: it takes seconds
    for key in (
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.chat_template",
    ):
        theirs, ours = (file.get_field(key).contents() for file in files)
        assert ours == theirs, key


@pytest.mark.parametrize(
    ("split", "ignore_merges", "name"),
    [
        ("gpt-2", False, "gpt-2"),
        ("smollm", False, "smollm"),
        ("llama-bpe", True, "llama-bpe"),
        ("llama-bpe", False, "smaug-bpe"),
        ("qwen2", False, "qwen2"),
    ],
)
def test_each_split_is_named_and_gives_the_same_tokens(
    split: str, ignore_merges: bool, name: str, tmp_path: Path
) -> None:
    tokenizer = models.byte_level(split, ignore_merges)
    file = export(tokenizer, tmp_path)
    assert metadata(file, "tokenizer.ggml.pre") == name
    assert differing(file, tokenizer, strings(300)) == []
    back = read_tokenizer(file)
    for text in strings():
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert back.encode(text, add_special_tokens=False) == expected


def test_the_wrong_split_would_show(tmp_path: Path) -> None:
    file = export(models.byte_level("gpt-2"), tmp_path)
    assert len(differing(file, models.byte_level("smollm"), strings(300))) > 15


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies(prefix: bool, tmp_path: Path) -> None:
    tokenizer = models.sentencepiece(prefix)
    file = export(tokenizer, tmp_path)
    assert metadata(file, "tokenizer.ggml.model") == "llama"
    assert metadata(file, "tokenizer.ggml.add_space_prefix") is prefix
    assert metadata(file, "tokenizer.ggml.add_bos_token") is True
    types = metadata(file, "tokenizer.ggml.token_type")
    assert types[:6] == [2, 3, 3, 3, 3, 6]
    assert differing(file, tokenizer, [text for text in strings(300) if text]) == []


def test_begin_of_text_is_announced_as_the_tokenizer_adds_it(tmp_path: Path) -> None:
    assert metadata(export(models.byte_level(bos=True), tmp_path), "tokenizer.ggml.add_bos_token") is True
    assert metadata(export(models.byte_level(), tmp_path), "tokenizer.ggml.add_bos_token") is False


def test_rows_without_a_token_are_unused_tokens(tmp_path: Path) -> None:
    tokenizer = models.byte_level()
    model = models.model("llama", len(tokenizer) + 2)
    file = write_gguf(models.lazy(model), model.config, tokenizer, tmp_path / "tiny.gguf")
    assert metadata(file, "tokenizer.ggml.token_type")[-3:] == [1, 5, 5]
    small = models.model("llama", len(tokenizer) - 1)
    with pytest.raises(ModelError, match=r"has id 47\d, but the model has 47\d embedding rows"):
        write_gguf(models.lazy(small), small.config, tokenizer, tmp_path / "small.gguf")


def test_added_words_are_matched_whole(tmp_path: Path) -> None:
    tokenizer = models.byte_level()
    tokenizer.add_tokens(["<tool>", "speedrun"])
    file = export(tokenizer, tmp_path)
    assert metadata(file, "tokenizer.ggml.token_type")[-2:] == [4, 4]
    assert differing(file, tokenizer, ["a <tool>x", "my speedruns", "speed run<tool>"]) == []


def test_an_unknown_split_is_an_error_not_a_guess(tmp_path: Path) -> None:
    tokenizer = models.byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ModelError, match=r"no name for the way this tokenizer splits text.*Punctuation"):
        export(tokenizer, tmp_path)
    with pytest.raises(ModelError, match="no name for the way"):
        export(models.byte_level("qwen2", ignore_merges=True), tmp_path)
    assert by_description({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, False) is None


def test_a_file_with_an_unknown_split_is_not_read_as_gpt2s(tmp_path: Path) -> None:
    file = export(models.byte_level("smollm"), tmp_path)
    data = file.read_bytes()
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(data.replace(b"smollm", b"strang"))
    with pytest.raises(ModelError, match=r"strange\.gguf: its tokenizer splits text as 'strang'"):
        read_tokenizer(strange)


def test_normalizers(tmp_path: Path) -> None:
    composing = models.byte_level("qwen2", normalizer=normalizers.NFC())
    file = export(composing, tmp_path)
    composed = [text for text in strings(300) if normalizers.NFC().normalize_str(text) == text]
    assert len(composed) > 250
    assert differing(file, composing, composed) == []
    with pytest.raises(ModelError, match=r"normalizes its text \(\{\"type\": \"Lowercase\"\}\)"):
        export(models.byte_level(normalizer=normalizers.Lowercase()), tmp_path)


def test_byte_fallback_with_merges_of_its_own_is_refused(tmp_path: Path) -> None:
    tokenizer = models.sentencepiece()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    del description["model"]["merges"][5]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))
    with pytest.raises(ModelError, match="merges are not those of a SentencePiece vocabulary"):
        export(tokenizer, tmp_path)
