"""Tiny seeded models and tokenizers, so that tests of loading and training need no download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML's markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def llama(tied: bool = True, layers: int = 2, hidden: int = 64, seed: int = 0) -> LlamaForCausalLM:
    """A fp32 Llama with grouped queries, weights from a seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def save_llama(
    folder: Path, dtype: torch.dtype = torch.bfloat16, shards: bool = False, tied: bool = True
) -> Path:
    """A model folder as Hugging Face writes it."""
    model = llama(tied=tied).to(dtype)
    model.save_pretrained(str(folder), **({"max_shard_size": "50KB"} if shards else {}))
    byte_tokenizer().save_pretrained(str(folder))
    return folder
