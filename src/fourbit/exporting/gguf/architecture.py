"""What llama.cpp wants to know of a model, and how its tensors differ from Hugging Face's.

Each architecture of llama.cpp computes one fixed graph. What a config says beyond that graph (another
activation, a window on other layers, biases) is refused here: the file would load and answer, wrongly.

Sources: llama.cpp, conversion/*.py and src/models/*.cpp; names from gguf's own tensor map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fourbit.errors import ModelError


@dataclass(frozen=True, slots=True)
class Architecture:
    """One graph of llama.cpp.

    name          in GGUF metadata
    activation    of the gated feed-forward
    rotary_pairs  q and k rows are stored with the two halves of each head interleaved
    norm_offset   added to norm weights: llama.cpp multiplies by the weight, Gemma by one plus it
    attention_bias, mlp_bias   whether the graph takes biases that the config can switch on
    window_every  every so many layers one sees all tokens, the others a window; 0: no window
    """

    name: str
    activation: str = "silu"
    rotary_pairs: bool = False
    norm_offset: float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    window_every: int = 0


_LLAMA = Architecture("llama", rotary_pairs=True, attention_bias=True, mlp_bias=True)
_GELU = "gelu_pytorch_tanh"
_ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", _GELU, norm_offset=1.0, window_every=2),
    "gemma3_text": Architecture("gemma3", _GELU, norm_offset=1.0, window_every=6),
}


def architecture(config: PretrainedConfig) -> Architecture:
    """The graph that computes this model; raises ModelError when there is none."""
    found = _ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"a model of type '{config.model_type}' cannot be exported to GGUF; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    _check(config, found)
    return found


def add_model(writer: Any, config: PretrainedConfig, arch: Architecture) -> None:
    """Write the model's shape and constants with a gguf.GGUFWriter."""
    heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config, arch))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if arch.window_every:
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_rope(writer, _rope(config))


def rotary_factors(config: PretrainedConfig) -> Tensor | None:
    """For Llama 3's rotary scaling: what each frequency is divided by, fp32 [head_dim / 2], else None."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dimension = head_dim(config)
    powers = torch.arange(0, dimension, 2, dtype=torch.int64).float() / dimension
    return (1.0 / rope["rope_theta"] ** powers) / scaled


def head_dim(config: PretrainedConfig) -> int:
    """Dimensions of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def transform(name: str, config: PretrainedConfig, arch: Architecture) -> Callable[[Tensor], Tensor]:
    """What a tensor of this Hugging Face name goes through on its way into the file."""
    if arch.norm_offset and name.endswith("norm.weight"):
        return lambda values: values.float() + arch.norm_offset
    heads = query_heads(name, config, arch)
    if heads:
        return lambda values: interleave(values, heads)
    return lambda values: values


def query_heads(name: str, config: PretrainedConfig, arch: Architecture) -> int:
    """How many heads' rows a q or k projection holds where its rows are interleaved; 0 elsewhere."""
    if not arch.rotary_pairs:
        return 0
    heads: int = config.num_attention_heads
    if ".q_proj." in name:
        return heads
    if ".k_proj." in name:
        return getattr(config, "num_key_value_heads", None) or heads
    return 0


def interleave(values: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half) to pairs: what llama.cpp rotates are neighbours."""
    pairs = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    parameters = config.rope_parameters
    # Gemma 3 has one set a layer type; what its windowed layers use is fixed in llama.cpp.
    rope = dict(parameters.get("full_attention", parameters))
    rope.setdefault("rope_type", "default")
    return rope


def _add_rope(writer: Any, rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _context(config: PretrainedConfig, arch: Architecture) -> int:
    window = getattr(config, "sliding_window", None)
    if window and not arch.window_every and config.model_type == "mistral":
        # llama.cpp's graph has no window: up to its length both compute the same.
        return min(config.max_position_embeddings, window)
    return int(config.max_position_embeddings)


def _check(config: PretrainedConfig, arch: Architecture) -> None:
    rope = _rope(config)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != arch.activation:
        raise _refused(config, f"the activation {activation}")
    if getattr(config, "attention_bias", False) and not arch.attention_bias:
        raise _refused(config, "biases in attention")
    if getattr(config, "mlp_bias", False) and not arch.mlp_bias:
        raise _refused(config, "biases in the feed-forward")
    kinds = ("default", "linear", "yarn") + (("llama3",) if arch is _LLAMA else ())
    if rope["rope_type"] not in kinds or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused(config, f"rotary embeddings of type {rope['rope_type']}")
    for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if rope["rope_type"] == "yarn" and rope.get(name) not in (None, _YARN.get(name)):
            raise _refused(config, f"YaRN with {name} = {rope[name]}")
    if getattr(config, "use_bidirectional_attention", None):
        raise _refused(config, "attention to later tokens")
    if arch.window_every:
        _check_gemma(config, arch)
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()) and arch is not _LLAMA:
        raise _refused(config, "a sliding window")


_YARN = {"beta_fast": 32, "beta_slow": 1}


def _check_gemma(config: PretrainedConfig, arch: Architecture) -> None:
    every = arch.window_every
    wanted = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != wanted:
        raise _refused(config, "windows on other layers than the published models'")
    per_head = config.hidden_size / config.num_attention_heads
    # llama.cpp tells the one size that scales by the width of all heads from its number of layers.
    largest = {"gemma2": 46, "gemma3": 62}[arch.name] == config.num_hidden_layers
    if not math.isclose(config.query_pre_attn_scalar, per_head if largest else head_dim(config)):
        raise _refused(config, f"query_pre_attn_scalar = {config.query_pre_attn_scalar}")
    caps = [getattr(config, f"{name}_logit_softcapping", None) for name in ("attn", "final")]
    if arch.name == "gemma2" and None in caps:
        raise _refused(config, "logits without soft caps")
    if arch.name == "gemma3":
        local = config.rope_parameters["sliding_attention"]
        if caps[0] is not None:
            raise _refused(config, "a soft cap on attention")
        if local["rope_theta"] != 10_000 or local.get("rope_type", "default") != "default":
            raise _refused(config, "rotary embeddings in windowed layers other than the published models'")


def _refused(config: PretrainedConfig, what: str) -> ModelError:
    return ModelError(
        f"llama.cpp's graph for a model of type '{config.model_type}' has no place for {what}; "
        "the export would answer wrongly"
    )
