"""Artifacts beside the adapter they came from: equal ones pass, each way of being wrong is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter

import fourbit
from fourbit.cli.main import main
from fourbit.config import RunConfig
from fourbit.config_file import load_config
from fourbit.errors import ConfigError, DataError, ModelError, VerificationError
from fourbit.exporting import llama_cpp, readers
from fourbit.exporting import verify as verifying
from fourbit.exporting.provenance import describe
from fourbit.exporting.rows import heldout_examples
from fourbit.exporting.verification import Bounds, Verification, record_path
from fourbit.exporting.verify import verify
from fourbit.nn.linear import Linear4bit
from fourbit.nn.lora import LoraLinear
from tests.tiny import CHATML, byte_tokenizer, llama, save_llama

WORDS = ("red", "blue", "green", "black", "white", "pink", "gray", "gold")
ROWS = [{"prompt": f"color {i}?" + "!" * (i % 3), "completion": WORDS[i % 8]} for i in range(32)]


@dataclass
class Run:
    """A finished run, and what it trained: on the base as fourbit holds it (merged), on the original."""

    folder: Path
    config: RunConfig
    adapter: Path
    merged: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    here = tmp_path_factory.mktemp("verify")
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        "model.path": save_llama(here / "model"),
        "model.compute_dtype": "float32",
        "data.train": here / "rows.jsonl",
        "data.heldout_fraction": 0.5,
        "train.max_steps": 20,
        "train.epochs": 100,
        "train.effective_batch": 8,
        "train.learning_rate": 0.02,
        "train.max_grad_norm": 1.0,
        "output": here / "run",
    }
    code = main(["train", *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
                 "--model", str(here / "model"), "--data", str(here / "rows.jsonl")])  # fmt: skip
    assert code == 0
    config = load_config(here / "run" / "config.yaml")
    adapter = here / "run" / "adapter"
    return Run(here / "run", config, adapter, save_merged(config, adapter, here / "merged"))


def save_merged(config: RunConfig, adapter: Path, folder: Path) -> Path:
    """W + scaling * B A of every layer, W as the 4-bit codes say, in fp32 under Hugging Face names."""
    model, tokenizer = fourbit.load(config.model.path, compute_dtype="float32")
    model = fourbit.model.adapters.load_adapter(model, adapter).get_base_model()
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            base = module.get_base_layer()
            assert isinstance(base, Linear4bit)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            tensors[f"{name}.weight"] = base.dequantize(torch.float32) + module.scaling["default"] * (b @ a)
        elif isinstance(getattr(module, "weight", None), torch.Tensor) and not re.search("lora|base_l", name):
            tensors[f"{name}.weight"] = module.weight.float()
    plain = llama()
    plain.load_state_dict(tensors, strict=True)
    plain.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        if file.name != "verification.json":
            (target / file.name).write_bytes(file.read_bytes())
    return target


def with_weights(source: Path, target: Path, change: Callable[[Any], Any]) -> Path:
    from transformers import AutoModelForCausalLM

    copy(source, target)
    model = AutoModelForCausalLM.from_pretrained(str(source))
    with torch.no_grad():
        change(model)
    model.save_pretrained(str(target))
    return target


def only(result: Verification) -> Any:
    (one,) = result.checked
    return one


def test_a_faithful_merge_passes_and_leaves_its_figures(run: Run) -> None:
    seen: list[tuple[str, int, int]] = []
    result = verify(run.config, run.adapter, [run.merged], rows=12, progress=lambda *at: seen.append(at))
    one = only(result)
    assert (result.rows, one.format, one.losses, one.defects) == (12, "16-bit", (), ())
    assert abs(one.loss_change) < 1e-4
    assert one.loss_error < 1e-4
    assert (one.agreement, one.same_tokens, one.same_template) == (1.0, 12, True)
    assert result.tokens == sum(len(score.completion) + 1 for score in heldout_words(run, 12))
    assert one.sha256 == describe("artifact", run.merged).sha256
    assert one.measured.reader.startswith("transformers ")
    result.check()
    record = json.loads((run.merged / "verification.json").read_text())
    assert record["measured"]["loss"] == one.measured.loss
    assert record["reference"]["loss"] == result.reference.loss
    assert record["adapter"]["sha256"] == describe("adapter", run.adapter).sha256
    assert record["bounds"] == {"loss_increase": 0.01, "agreement": 0.97}
    assert {"versions", "command", "sha256", "base"} <= set(record)
    assert {name for name, _, _ in seen} == {"hashes (MB)", "adapter", "merged"}
    assert [at[1:] for at in seen if at[0] == "merged"][-1] == (12, 12)


@dataclass
class Word:
    completion: str


def heldout_words(run: Run, count: int) -> list[Word]:
    examples = heldout_examples(run.config, byte_tokenizer(), count=count)
    lines = [int(example.source.rpartition(":")[2]) for example in examples]
    return [Word(str(ROWS[line - 1]["completion"])) for line in lines]


def test_the_rows_are_those_that_training_held_out(run: Run) -> None:
    from rich.console import Console

    from fourbit.training.prepare import prepare_data

    _, _, heldout = prepare_data(run.config, byte_tokenizer(), Console(quiet=True))
    assert list(heldout_examples(run.config, byte_tokenizer())) == list(heldout)
    whole = load_config(run.folder / "config.yaml", ["data.heldout_fraction=0"])
    with pytest.raises(ConfigError, match="no rows were held out"):
        heldout_examples(whole, byte_tokenizer())


def test_a_dropped_adapter_is_an_error_unless_accepted(run: Run) -> None:
    base = Path(run.config.model.path)
    result = verify(run.config, run.adapter, [run.merged, base], rows=16)
    merged, dropped = result.checked
    assert dropped.loss_change > 0.05
    assert dropped.agreement < 0.97
    assert result.best is merged
    with pytest.raises(
        VerificationError, match=r"model: its held-out loss is .* and its likeliest token is "
    ):
        result.check()
    assert VerificationError.exit_code == 7
    result.check(accept_loss=True)
    wide = verify(run.config, run.adapter, [base], rows=16, bounds=Bounds(1000.0, 0.0))
    wide.check()


def test_a_loss_near_zero_is_held_against_the_floor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    worse = verify(run.config, None, [Path(run.config.model.path)], rows=4, bounds=Bounds(0.0, 0.0))
    change = worse.checked[0].measured.loss - worse.reference.loss
    assert change != 0  # the 16-bit base is another model than the 4-bit one
    monkeypatch.setattr(verifying, "LOSS_FLOOR", 1e9)
    assert only(verify(run.config, None, [Path(run.config.model.path)], rows=4)).losses == ()


def test_another_tokenizer_is_never_accepted(run: Run, tmp_path: Path) -> None:
    wrong = copy(run.merged, tmp_path / "wrong")
    text = (wrong / "tokenizer.json").read_text()
    tokens = json.loads(text)
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (wrong / "tokenizer.json").write_text(json.dumps(tokens))
    result = verify(run.config, run.adapter, [wrong], rows=8)
    assert only(result).same_tokens < 8
    assert only(result).losses == ()
    with pytest.raises(
        VerificationError, match=r"its tokenizer splits \d of 8 rows otherwise than in training$"
    ):
        result.check(accept_loss=True)


def test_another_chat_template_is_never_accepted(run: Run, tmp_path: Path) -> None:
    wrong = copy(run.merged, tmp_path / "wrong")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant")
    tokenizer.save_pretrained(str(wrong))
    result = verify(run.config, run.adapter, [wrong], rows=4)
    assert (only(result).same_tokens, only(result).same_template) == (4, False)
    with pytest.raises(VerificationError, match="its chat template is not the one of training"):
        result.check(accept_loss=True)


def test_a_loss_that_is_no_number_is_never_accepted(run: Run, tmp_path: Path) -> None:
    broken = with_weights(
        run.merged, tmp_path / "nan", lambda model: model.model.norm.weight.fill_(torch.nan)
    )
    result = verify(run.config, run.adapter, [broken], rows=4)
    with pytest.raises(VerificationError, match="its held-out loss is not a number"):
        result.check(accept_loss=True)
    assert json.loads((broken / "verification.json").read_text())["measured"]["loss"] is None


def test_bitsandbytes_reads_a_4_bit_folder(run: Run, tmp_path: Path) -> None:
    model, tokenizer = fourbit.load(run.config.model.path, compute_dtype="bfloat16")
    fourbit.save_quantized(model, tokenizer, tmp_path / "packed")
    config = load_config(run.folder / "config.yaml", ["model.compute_dtype=bfloat16"])
    result = verify(config, None, [tmp_path / "packed"], rows=16)
    one = only(result)
    assert one.format == "bitsandbytes"
    assert "bitsandbytes 0." in one.measured.reader
    assert abs(one.loss_change) < 0.02
    assert result.adapter is None


def test_stock_peft_reads_an_adapter(run: Run) -> None:
    config = load_config(run.folder / "config.yaml", ["model.quant_type=none"])
    one = only(verify(config, run.adapter, [run.adapter], rows=8))
    assert (one.format, one.same_tokens, one.agreement) == ("adapter", None, 1.0)
    assert abs(one.loss_change) < 1e-4
    assert "peft " in one.measured.reader


@pytest.mark.slow
def test_a_gguf_base_is_read_by_transformers_for_peft(smollm2: Path) -> None:
    settings = load_config(None, [f"model.path={smollm2}", "data.train=x"]).model
    model = readers._from_pretrained(Path(settings.path), torch.bfloat16, torch.device("cpu"), False)
    assert model.lm_head.weight.shape == (49152, 576)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def gguf_file(path: Path, **strings: str) -> Path:
    writer = GGUFWriter(str(path), "llama")
    for key, value in strings.items():
        writer.add_string(key.replace("_", ".", 1), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In llama.cpp's place: likes token 5 everywhere with probability 1/e, and splits texts into bytes."""
    opened: list[Any] = []

    @dataclass
    class TokenScore:
        log_probability: float
        top1: int

    class LlamaCppReader:
        def __init__(self, path: Path, lora: Path | None, context: int) -> None:
            self.arguments, self.closed = (path, lora, context), False
            opened.append(self)

        def tokenize(self, text: str) -> list[int]:
            ids: list[int] = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
            return ids

        def score_all(self, rows: Any, progress: Any) -> list[list[TokenScore]]:
            return [[TokenScore(-1.0, 5) for flag in trained if flag] for _, trained in rows]

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(llama_cpp, "LlamaCppReader", LlamaCppReader)
    monkeypatch.setattr(readers, "find_spec", lambda name: object())
    monkeypatch.setattr(llama_cpp, "version", lambda name: "1.2")
    return opened


def test_llama_cpp_reads_a_gguf(run: Run, tmp_path: Path, binding: list[Any]) -> None:
    file = gguf_file(tmp_path / "model.Q8_0.gguf", general_type="model", tokenizer_chat_template=CHATML)
    result = verify(run.config, run.adapter, [file], rows=6, bounds=Bounds(1e9, 0.0))
    one = only(result)
    assert (one.format, one.measured.reader, one.measured.loss) == ("gguf", "llama.cpp (xllamacpp 1.2)", 1.0)
    assert (one.same_tokens, one.same_template) == (6, True)
    assert one.bytes == file.stat().st_size
    assert record_path(file) == tmp_path / "model.Q8_0.gguf.verification.json"
    assert json.loads(record_path(file).read_text())["sha256"] == describe("artifact", file).sha256
    (reader,) = binding
    assert (reader.arguments[:2], reader.closed) == ((file, None), True)
    examples = heldout_examples(run.config, byte_tokenizer(), count=6)
    assert reader.arguments[2] == 1 + max(len(example.input_ids) for example in examples)


def test_a_lora_gguf_is_read_on_its_base(run: Run, tmp_path: Path, binding: list[Any]) -> None:
    lora = gguf_file(tmp_path / "lora.gguf", general_type="adapter")
    with pytest.raises(
        ModelError, match=r"lora.gguf: a LoRA file is read on its base as .gguf, and .*model is none"
    ):
        verify(run.config, run.adapter, [lora], rows=2)
    base = gguf_file(tmp_path / "base.gguf", general_type="model", tokenizer_chat_template=CHATML)
    one = only(verify(run.config, run.adapter, [lora], rows=2, gguf_base=base))
    assert (one.format, binding[-1].arguments[:2]) == ("lora gguf", (base, lora))


@pytest.mark.parametrize(
    ("kind", "package"),
    [("bitsandbytes", "bitsandbytes"), ("compressed-tensors", "compressed-tensors"), ("gguf", "xllamacpp")],
)
def test_a_missing_reader_is_one_line_before_anything_is_loaded(
    kind: str, package: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "gguf":
        artifact = gguf_file(tmp_path / "model.gguf", general_type="model")
    else:
        artifact = copy(run.merged, tmp_path / "model")
        config = json.loads((artifact / "config.json").read_text())
        config["quantization_config"] = {"quant_method": kind}
        (artifact / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(readers, "find_spec", lambda name: None if name == package.replace("-", "_") else 1)
    monkeypatch.setattr(verifying, "open_reference", None)
    with pytest.raises(ModelError, match=rf"needs the package {package}, .*: pip install {package}$"):
        verify(run.config, run.adapter, [artifact])


def test_what_is_no_artifact(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "open_reference", None)
    strange = copy(run.merged, tmp_path / "strange")
    (strange / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}')
    cases = {
        tmp_path / "none": "no model folder, adapter folder or .gguf file",
        tmp_path: "no model folder, adapter folder or .gguf file",
        strange: "quantized by 'hqq', which no independent reader is known for",
    }
    for artifact, message in cases.items():
        with pytest.raises(ModelError, match=message):
            verify(run.config, run.adapter, [artifact])
    (strange / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: cannot be read"):
        verify(run.config, run.adapter, [strange])
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"bad.gguf: cannot be read as GGUF"):
        verify(run.config, run.adapter, [tmp_path / "bad.gguf"])
    with pytest.raises(ConfigError, match="at least one artifact"):
        verify(run.config, run.adapter, [])
    with pytest.raises(ConfigError, match="rows = 0"):
        verify(run.config, run.adapter, [run.merged], rows=0)


def test_a_damaged_artifact_is_one_line(run: Run, tmp_path: Path) -> None:
    cut = copy(run.merged, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"cut: cannot be read back \("):
        verify(run.config, run.adapter, [cut], rows=2)
    with pytest.raises(ModelError, match=r"nothing: no such file or folder"):
        verify(run.config, tmp_path / "nothing", [run.merged], rows=2)
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        verify(run.config, run.adapter, [run.merged], files=[str(tmp_path / "none.jsonl")])


@pytest.mark.parametrize("bounds", [(-0.1, 0.9), (float("nan"), 0.9), (0.1, 1.1), (0.1, -0.1)])
def test_bounds_that_make_no_sense(bounds: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="such as 0"):
        Bounds(*bounds)


def test_the_command(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def fourbit_verify(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["verify", str(run.folder), *map(str, words)])
        return code, *capsys.readouterr()

    base = run.config.model.path
    code, out, error = fourbit_verify(run.merged, "--rows", 8)
    assert (code, error) == (0, "")
    assert "8 held-out rows" in out
    assert "8/8" in out
    assert f"{run.merged}: read by transformers " in out
    code, out, error = fourbit_verify(run.merged, base, "--rows", 8)
    assert code == 7
    assert f"lowest loss: {run.merged}" in out
    assert error.startswith(f"fourbit verify: error: {base}: its held-out loss is ")
    assert len(error.splitlines()) == 1
    assert fourbit_verify(base, "--rows", 8, "--accept-loss")[0] == 0
    rows = ("--rows", 3, "--data", run.config.data.train[0])
    code, out, _ = fourbit_verify(base, *rows, "--json", "--threshold", 1e9, "--agreement", 0)
    assert (code, json.loads(out)["rows"]) == (0, 3)
    for words, message in {
        ("--rows", 0): "--rows 0: give at least 1",
        ("--threshold", -1): "--threshold -1: give a percentage of the loss, such as 1",
        ("--agreement", 101): "--agreement 101: give a percentage from 0 to 100",
    }.items():
        assert fourbit_verify(run.merged, *words) == (2, "", f"fourbit verify: error: {message}\n")
