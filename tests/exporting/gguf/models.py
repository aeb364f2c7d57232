"""Tiny seeded models of every architecture that can be exported, and tokenizers with merges."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from fourbit.model.formats.lazy import LazyTensor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog while the card is being delivered to the bank",
    "for i in range(10):\n    print(i, 'tokens', 3.14159)\n\treturn None  # done",
    "Größe, naïve façade, Ελλάδα, Привет мир, 日本語のテキスト, 한국어, 🙂🙃 — “quotes”…",
    "1234567890 2024-11-22 99% 1,000,000 0x1F 3e8     spaces   and\n\n\nlines\r\n",
]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    split: str = "gpt-2", ignore_merges: bool = False, normalizer: object = None, bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges learned from a few lines, split as the named family splits."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    patterns = {"llama-bpe": LLAMA3_SPLIT, "qwen2": LLAMA3_SPLIT.replace("{1,3}", "")}
    if split in patterns:
        isolated = pre_tokenizers.Split(Regex(patterns[split]), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([isolated, plain])
    elif split == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain])
    else:
        backend.pre_tokenizer = plain
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return _wrap(backend, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")


def sentencepiece(prefix: bool = True) -> PreTrainedTokenizerFast:
    """A SentencePiece vocabulary as its conversion to a tokenizer.json leaves it.

    Bytes, then pieces in order of merging, and as merges every pair of pieces that makes a piece.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=250, show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    pieces = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in pieces)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def _wrap(backend: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **tokens
    )
    tokenizer.chat_template = CHATML
    return tokenizer


_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {
    **_SHAPE,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "final_logit_softcapping": 30.0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(name: str, rows: int, **changes: object) -> PretrainedConfig:
    """A tiny configuration of the named kind."""
    kinds: dict[str, tuple[type[PretrainedConfig], Mapping[str, object]]] = {
        "llama": (LlamaConfig, {**_SHAPE, "tie_word_embeddings": True}),
        "llama-untied": (LlamaConfig, _SHAPE),
        "llama-biases": (LlamaConfig, {**_SHAPE, "attention_bias": True, "mlp_bias": True}),
        "llama3-rope": (LlamaConfig, {**_SHAPE, "rope_parameters": _LLAMA3_ROPE}),
        "linear-rope": (
            LlamaConfig,
            {**_SHAPE, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
        ),
        "mistral": (MistralConfig, {**_SHAPE, "sliding_window": None, "head_dim": 32}),
        "qwen2": (Qwen2Config, {**_SHAPE, "tie_word_embeddings": True}),
        "qwen3": (Qwen3Config, {**_SHAPE, "head_dim": 32}),
        "gemma2": (Gemma2Config, {**_GEMMA, "attn_logit_softcapping": 50.0}),
        "gemma3": (Gemma3TextConfig, {**_GEMMA, "num_hidden_layers": 7, "final_logit_softcapping": None}),
    }
    kind, shape = kinds[name]
    return kind(**{**shape, "vocab_size": rows, **changes})


def model(name: str, rows: int, **changes: object) -> PreTrainedModel:
    """A fp32 model with weights from a seed, large enough that its answers depend on every one of them."""
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config(name, rows, **changes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval()


def lazy(built: PreTrainedModel, dtype: torch.dtype = torch.float32) -> dict[str, LazyTensor]:
    """A model's tensors as an exporter gets them."""

    def reader(parameter: torch.nn.Parameter) -> LazyTensor:
        return LazyTensor(lambda: parameter.detach().to(dtype), dtype)

    return {name: reader(parameter) for name, parameter in built.named_parameters()}
