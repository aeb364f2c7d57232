"""Whole models: written, and read back by transformers and by llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fourbit.errors import ConfigError, ModelError
from fourbit.exporting.gguf.llama_cpp import LlamaCppReader
from fourbit.exporting.gguf.write import write_gguf
from fourbit.model.formats.lazy import LazyTensor
from tests.exporting.gguf import models

TEXT = (
    "<|im_start|>user\nhé 日本 ok, the quick brown fox jumps over 12345 lazy dogs, and on until the "
    "window of sixteen tokens is long passed<|im_end|>\n"
)
# llama.cpp takes GELU from a table of fp16 values.
GELU, EXACT = 3e-3, 2e-5
NAMES = {
    "llama": EXACT,
    "llama-untied": EXACT,
    "llama-biases": EXACT,
    "llama3-rope": EXACT,
    "linear-rope": EXACT,
    "mistral": EXACT,
    "qwen2": EXACT,
    "qwen3": EXACT,
    "gemma2": GELU,
    "gemma3": GELU,
}


def export(
    tmp_path: Path, name: str, quant: str = "F32", file: str = "tiny.gguf", **changes: object
) -> tuple[PreTrainedModel, Path]:
    tokenizer = models.byte_level()
    model = models.model(name, len(tokenizer) + 3, **changes)
    return model, write_gguf(models.lazy(model), model.config, tokenizer, tmp_path / file, quant)


def log_probabilities(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def gaps(model: PreTrainedModel, file: Path) -> list[float]:
    """How far each token's log-probability in llama.cpp is from the model's."""
    ids = models.byte_level().encode(TEXT)
    assert len(ids) > 40
    expected = log_probabilities(model, ids)
    with LlamaCppReader(file, context=128, threads=1, slots=1) as reader:
        scores = reader.score(ids, [True] * len(ids))
    assert len(scores) == len(ids) - 1
    return [abs(score.log_probability - expected[i, ids[i + 1]].item()) for i, score in enumerate(scores)]


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_computes_the_same_log_probabilities(name: str, tmp_path: Path) -> None:
    model, file = export(tmp_path, name)
    assert max(gaps(model, file)) < NAMES[name]


def test_the_tolerance_would_show_a_wrong_rotary_order(tmp_path: Path) -> None:
    model, _ = export(tmp_path, "llama")
    tensors = models.lazy(model)
    key = "model.layers.0.self_attn.k_proj.weight"
    straight = tensors[key].read()
    heads = straight.reshape(2, 8, 2, 64).transpose(1, 2).reshape(32, 64)  # undone before it is done
    tensors[key] = LazyTensor(lambda: heads, torch.float32)
    file = write_gguf(tensors, model.config, models.byte_level(), tmp_path / "wrong.gguf", "F32")
    assert max(gaps(model, file)) > 100 * EXACT


@pytest.mark.parametrize("name", ["llama", "llama-untied", "mistral", "qwen2", "gemma2", "gemma3"])
def test_transformers_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    # The weights, not the answers: of the config its reader takes over only part.
    # The name must not hold "mistral": transformers would take it for an architecture.
    model, file = export(tmp_path, name)
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, dtype=torch.float32)
    expected = dict(model.named_parameters())
    assert {key for key, _ in read.named_parameters()} == set(expected)
    for key, value in read.named_parameters():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("quant", "bound"),
    [("F16", 0.003), ("BF16", 0.03), ("Q8_0", 0.08), ("Q6_K", 0.15), ("Q4_0", 0.45), ("Q4_K_M", 0.45)],
)
def test_every_type_loads_and_is_as_close_as_its_bits(quant: str, bound: float, tmp_path: Path) -> None:
    model, file = export(tmp_path, "llama", quant, hidden_size=256, intermediate_size=512)
    found = gaps(model, file)
    assert sum(found) / len(found) < bound
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "only the finished file is left"


def test_types_of_tensors(tmp_path: Path) -> None:
    _, file = export(tmp_path, "llama", "Q4_0")
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(str(file)).tensors}
    assert stored["token_embd.weight"] == "Q8_0", "it makes the logits, too"
    assert stored["blk.0.attn_q.weight"] == "Q4_0"
    assert stored["blk.0.attn_norm.weight"] == "F32"
    assert "output.weight" not in stored

    _, file = export(tmp_path, "llama-untied", "Q4_0", intermediate_size=144)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(str(file)).tensors}
    assert stored["token_embd.weight"] == "Q4_0"
    assert stored["output.weight"] == "Q8_0"
    assert stored["blk.0.ffn_down.weight"] == "F16", "no block of 32 fits rows of 144"


def test_quantized_bytes_are_the_gguf_packages_own(tmp_path: Path) -> None:
    model, file = export(tmp_path, "llama", "Q8_0")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(file)).tensors}
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight").detach().numpy()
    expected = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    assert (stored["blk.1.ffn_down.weight"] == expected).all()


def test_a_window_that_llama_cpp_does_not_have_limits_the_context(tmp_path: Path) -> None:
    _, file = export(tmp_path, "mistral", sliding_window=128)
    assert gguf.GGUFReader(str(file)).get_field("llama.context_length").contents() == 128


def test_an_architecture_without_a_graph_is_refused(tmp_path: Path) -> None:
    model = models.model("llama", 600)
    model.config.model_type = "gpt2"
    with pytest.raises(ModelError, match=r"'gpt2' cannot be exported to GGUF; supported: llama, mistral"):
        write_gguf(models.lazy(model), model.config, models.byte_level(), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"hidden_act": "relu"}, "the activation relu"),
        ("llama", {"rope_parameters": DYNAMIC}, "rotary embeddings of type dynamic"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "windows on other layers"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
        ("gemma2", {"attn_logit_softcapping": None}, "logits without soft caps"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "a sliding window",
        ),
        ("qwen3", {"attention_bias": True}, "biases in attention"),
    ],
)
def test_a_config_beyond_the_graph_is_refused(name: str, changes: dict, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        export(tmp_path, name, **changes)


def test_an_incomplete_or_foreign_checkpoint_is_one_line(tmp_path: Path) -> None:
    model, tokenizer = models.model("llama", 600), models.byte_level()
    tensors = models.lazy(model)
    lacking = {key: value for key, value in tensors.items() if "layers.1.mlp.up" not in key}
    with pytest.raises(ModelError, match=r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        write_gguf(lacking, model.config, tokenizer, tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"holds 'extra', which has no place in it"):
        write_gguf(
            {**tensors, "extra": tensors["model.norm.weight"]}, model.config, tokenizer, tmp_path / "x"
        )
    with pytest.raises(ConfigError, match=r"'Q4_K' is not a GGUF type \(did you mean 'Q4_K_[SM]'\?\)"):
        write_gguf(tensors, model.config, tokenizer, tmp_path / "x.gguf", "Q4_K")


@pytest.mark.parametrize(
    ("value", "quant", "reason"),
    [(1e5, "F16", "beyond fp16's range; export as BF16 or F32"), (float("nan"), "F32", "not finite")],
)
def test_values_that_the_type_cannot_hold_are_an_error(
    value: float, quant: str, reason: str, tmp_path: Path
) -> None:
    model = models.model("llama", 600)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = value
    with pytest.raises(ModelError, match=rf"up_proj\.weight' holds values.*{reason}"):
        write_gguf(models.lazy(model), model.config, models.byte_level(), tmp_path / "x.gguf", quant)
    assert not list(tmp_path.iterdir())


def test_one_tensor_is_read_at_a_time_and_progress_counts_them(tmp_path: Path) -> None:
    model = models.model("llama", 600)
    reads: list[str] = []

    def watched(name: str, tensor: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            reads.append(name)
            return tensor.read()

        return LazyTensor(read, tensor.dtype)

    tensors = {name: watched(name, tensor) for name, tensor in models.lazy(model).items()}
    seen: list[tuple[int, int]] = []
    write_gguf(
        tensors,
        model.config,
        models.byte_level(),
        tmp_path / "x.gguf",
        progress=lambda done, total: (
            seen.append((done, total)) or (len(reads) == done or pytest.fail("ahead"))
        ),
    )
    assert sorted(reads) == sorted(tensors)
    assert seen == [(index + 1, len(tensors)) for index in range(len(tensors))]
