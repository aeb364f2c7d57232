"""Write the inputs from which fuzzing starts, small and valid: `python fuzz/make_corpus.py`."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import datasets  # noqa: E402
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from fourbit.exporting.gguf.write import write_gguf  # noqa: E402
from fourbit.model.formats import hf  # noqa: E402
from fourbit.model.formats.own import own_config  # noqa: E402
from fuzz.targets import CORPUS, merging_tokenizer, tiny_config, tokenizer  # noqa: E402
from tests.tiny import CHATML  # noqa: E402

ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "p ", "completion": "c"},
    {"instruction": "i", "input": "x", "output": "o"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<think>t</think>b"}]},
    {"text": "some text"},
]
CALLS = {
    "tools": '[{"type": "function", "function": {"name": "f"}}]',
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": [1]}'}}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b", "reasoning_content": "r"},
    ],
}
STATE = {
    "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 32],
    "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5,
}  # fmt: skip
TEMPLATES = [
    CHATML,
    "{%- if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ bos_token }}"
    "{%- for m in messages %}{% generation %}[{{ m.role | trim }}] {{ m.content | tojson }}"
    "{% endgeneration %}"
    "{{ '\n' }}{% endfor %}{{ eos_token if not add_generation_prompt else '[assistant] ' }}",
    "{% set ns = namespace(n=0) %}{% macro turn(m) %}{{ m['content'].split('x')[-1] }}{% endmacro %}"
    "{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index %}{{ turn(m) ~ ns.n }}{% endfor %}",
    "{{ messages.__class__.__mro__ }}{{ self._TemplateReference__context }}{{ ''.format.__globals__ }}",
]


def put(target: str, name: str, data: bytes | str) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def main() -> None:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work = Path(name)
        models(work)
        adapters(work)
        data(work)
        texts()


def models(work: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).to(torch.float16)
    model.save_pretrained(str(work / "model"))
    tokenizer().save_pretrained(str(work / "model"))
    put("safetensors", "model", (work / "model" / "model.safetensors").read_bytes())
    put("model_config", "llama", (work / "model" / "config.json").read_bytes())
    put(
        "model_config",
        "qwen2",
        json.dumps({"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 32}),
    )
    put(
        "model_config",
        "mixtral",
        json.dumps({"model_type": "mixtral", "num_local_experts": 2, "hidden_size": 8}),
    )
    put("tokenizer", "bytes", (work / "model" / "tokenizer.json").read_bytes())
    merging_tokenizer().save_pretrained(str(work / "merging"))
    put("tokenizer", "merges", (work / "merging" / "tokenizer.json").read_bytes())
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    put("index", "two", json.dumps(index))
    tensors = hf.open_folder(work / "model")
    write_gguf(tensors, tiny_config(), merging_tokenizer(), work / "model.gguf", "Q8_0")
    for target in ("gguf", "gguf_model"):
        put(target, "llama", (work / "model.gguf").read_bytes())
    put("bnb", "nested", b"\0" + json.dumps(STATE).encode())
    plain = {key: value for key, value in STATE.items() if "nested" not in key}
    put("bnb", "plain", b"\4" + json.dumps(plain).encode())
    put("own", "mixture", json.dumps(own_config("nf4", 64, True, ["lm_head"])))


def adapters(work: Path) -> None:
    model = get_peft_model(
        LlamaForCausalLM(tiny_config()), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    model.save_pretrained(str(work / "adapter"))
    kept = CORPUS.parent / "folders" / "adapter"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(work / "adapter" / file, kept / file)
    config = json.loads((kept / "adapter_config.json").read_text()) | {"base_model_name_or_path": "base"}
    (kept / "adapter_config.json").write_text(json.dumps(config, sort_keys=True))
    put("adapter_config", "lora", json.dumps(config, sort_keys=True))
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*down.*": 4}, "target_modules": ".*_proj"}
    put("adapter_config", "patterns", json.dumps(config | patterns | {"use_rslora": True}))
    put("adapter_weights", "lora", (kept / "adapter_model.safetensors").read_bytes())


def data(work: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    put("jsonl", "forms", lines)
    put("jsonl", "calls", json.dumps(CALLS))
    put("json", "forms", json.dumps(ROWS, indent=1))
    put("json", "calls", json.dumps([CALLS]))
    put("csv", "pairs", 'prompt,completion\n"a, ""b""",c\n\nd,"e\nf"\n')
    put("text", "markdown", "\ufeff# Title\r\n\r\nSome text.\n")
    put("gz", "lines", gzip.compress(lines, mtime=0))
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(lines)
    put("zst", "lines", sink.getvalue().to_pybytes())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in (("a/b.jsonl", lines), ("c.txt", b"text"), ("../d.csv", b"text\nx\n")):
            archive.writestr(zipfile.ZipInfo(entry), content, zipfile.ZIP_DEFLATED)
    put("zip", "three", packed.getvalue())
    table = pyarrow.Table.from_pylist([{"prompt": "p", "completion": "c"}] * 3)
    pyarrow.parquet.write_table(table, work / "pairs.parquet")
    put("parquet", "pairs", (work / "pairs.parquet").read_bytes())
    chats = pyarrow.Table.from_pylist([ROWS[0]])
    pyarrow.parquet.write_table(chats, work / "chats.parquet", compression="zstd")
    put("parquet", "chats", (work / "chats.parquet").read_bytes())
    kept = CORPUS.parent / "folders" / "arrow"
    shutil.rmtree(kept, ignore_errors=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}] * 3).save_to_disk(str(kept))
    for number, file in enumerate(("state.json", "dataset_info.json", "data-00000-of-00001.arrow")):
        put("arrow", file.split(".")[0], bytes([number]) + (kept / file).read_bytes())


def texts() -> None:
    for number, template in enumerate(TEMPLATES):
        put("template", str(number), template)
    tree = {"model": {"path": "m"}, "lora": {"r": 4}, "data": {"train": ["a.jsonl"]}, "output": "runs/x"}
    put("settings", "block", yaml.safe_dump(tree))
    put("settings", "flow", "{model: {path: m}, data: {train: a}, eval: {metrics: [regex], pattern: x}}")
    put("overrides", "two", "model.path=m\ndata.train=[a, b]\n")
    state = {
        "sha256": "0", "files": {}, "progress": {"step": 1}, "guard": {}, "metrics_bytes": 0, "settings": {},
        "identity": {"compute_dtype": "float32"},
    }  # fmt: skip
    put("checkpoint", "state", json.dumps(state))
    put("metrics", "one", json.dumps({"step": 1, "loss": 2.5, "grad_norm": 0.1, "tokens": 9, "seconds": 1.0}))
    step = {"kind": "train", "sources": [], "settings": {}, "command": "", "versions": {}, "effect": {}}
    put("provenance", "train", json.dumps({"steps": [step]}))


if __name__ == "__main__":
    main()
