"""Bad input: one line that says what is wrong, where, and what to do; a non-zero exit; no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourbit.cli.main import COMMANDS
from tests.cli.conftest import ROWS, Fourbit

ROW = ROWS.splitlines()[0] + "\n"
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
TRAIN = "train --model model --data rows.jsonl --output run --set model.compute_dtype=float32 "

#: What stands in the working directory beside the models and rows.jsonl.
FILES = {
    "empty.jsonl": "",
    "blank.jsonl": ROW + "\n" + ROW,
    "object.jsonl": ROW + "{}\n",
    "cut.jsonl": ROW + ROW + '{"prompt": "a"\n' + ROW,
    "short.csv": "prompt,completion\na,b\nc\n",
    "answer.jsonl": ROW + '{"prompt": "a", "completion": ""}\n',
    "columns.jsonl": '{"topic": "a", "answer": "b"}\n',
    "chat.jsonl": CHAT,
    "tabs.yaml": "model:\n\tpath: model\n",
    "typo.yaml": "model:\n  path: model\n  quant_typ: nf4\ndata:\n  train: rows.jsonl\n",
    "section.yaml": "model:\n  path: model\nlorra:\n  r: 8\ndata:\n  train: rows.jsonl\n",
    "full/file": "mine",
    "held/metrics.jsonl": "",
}

CASES = [
    # settings
    (
        "train none.yaml",
        2,
        "none.yaml: no such config file; `fourbit init none.yaml` writes one to start from",
    ),
    ("train", 2, "give a config file, or --model and --data"),
    (
        "train tabs.yaml",
        2,
        "tabs.yaml:2: not valid YAML (found character '\\t' that cannot start any token)",
    ),
    ("train typo.yaml", 2, "typo.yaml: unknown key 'model.quant_typ' (did you mean 'quant_type'?)"),
    ("train section.yaml", 2, "section.yaml: unknown key 'lorra' (did you mean 'lora'?)"),
    (
        TRAIN + "--set lora.rank=8",
        2,
        "settings: unknown key 'lora.rank'; "
        "known are r, alpha, dropout, target_modules, rslora, modules_to_save",
    ),
    (TRAIN + "--set lora.r", 2, "--set lora.r: write it as section.key=value, such as lora.r=32"),
    (
        TRAIN + "--set lora.r=0",
        2,
        "settings: 'lora.r' = 0: input should be greater than or equal to 1 "
        "(rank; 8 to 16 for small models, 64 to 128 above 30B)",
    ),
    (
        TRAIN + "--set model.quant_type=int5",
        2,
        "settings: 'model.quant_type' = 'int5': input should be 'nf4', 'fp4', 'int4' or 'none'",
    ),
    (
        TRAIN + "--set lora=none",
        2,
        "settings: lora: none trains the base itself, which 4-bit weights cannot: "
        "set model.quant_type to none",
    ),
    (
        TRAIN + "--set eval=3",
        2,
        "settings: 'eval' = 3: must be a section with max_new_tokens, batch_size, metrics, pattern, shots, "
        "shots_file, choice_prompt",
    ),
    # data: found before the model is loaded
    (
        TRAIN + "--data row.jsonl",
        3,
        "row.jsonl: no such file (did you mean 'rows.jsonl'?); check the path",
    ),
    (TRAIN + "--data empty.jsonl", 3, "empty.jsonl: the file is empty; give a file with at least one row"),
    (TRAIN + "--data blank.jsonl", 3, "blank.jsonl:2: the row is empty; remove it"),
    (TRAIN + "--data object.jsonl", 3, "object.jsonl:2: the row is empty; remove it"),
    (
        TRAIN + "--data cut.jsonl",
        3,
        "cut.jsonl:3: not valid JSON (Expecting ',' delimiter, column 15); repair the row",
    ),
    (
        TRAIN + "--data short.csv",
        3,
        "short.csv:3: the row has 1 values and the header 2 columns; "
        "repair it, and quote values that hold the delimiter",
    ),
    (
        TRAIN + "--data answer.jsonl",
        3,
        "answer.jsonl:2: 'completion' is empty, so there is nothing to train on; fill it or remove the row "
        "(`data.allow: [empty]` drops such rows)",
    ),
    (
        TRAIN + "--data columns.jsonl",
        3,
        "columns.jsonl:1: cannot tell what to train on from the columns topic, answer; name them "
        "messages, prompt and completion, instruction and output, question and answer, or text, "
        "or set data.prompt and data.completion",
    ),
    (
        TRAIN + "--set data.prompt={promt} --set data.completion={completion}",
        3,
        "rows.jsonl:1: data.prompt uses the column 'promt' (did you mean 'prompt'?), "
        "but the row has prompt, completion",
    ),
    (
        TRAIN + "--model plain --data chat.jsonl",
        3,
        "chat.jsonl:1: chat messages need a model with a chat template and this one has none; "
        "use an instruct model or prompt and completion columns",
    ),
    (
        TRAIN + "--set data.max_length=8",
        3,
        "every row is longer than data.max_length, 8 tokens (the longest has 35); raise it",
    ),
    # models
    (TRAIN + "--model ./nowhere", 4, "./nowhere: no such model folder or .gguf file"),
    (
        TRAIN + "--model no/where",
        4,
        "no/where: no such folder, and the hub cannot be reached; download it first, or check the name",
    ),
    (TRAIN + "--model full", 4, "full: no config.json here; a model folder has one"),
    (TRAIN + "--model mute", 4, "mute: has no tokenizer; add tokenizer.json from the model's source"),
    (
        TRAIN + "--model cut",
        4,
        "cut/model.safetensors: truncated or damaged (Error while deserializing header: "
        "incomplete metadata, file not fully covered); download it again",
    ),
    (
        TRAIN + "--set model.compute_dtype=float16",
        2,
        "model.compute_dtype = 'float16': on a CPU float16 products run 15 to 200 times slower; "
        "use bfloat16, float32 or auto",
    ),
    (TRAIN + "--set model.device=gpu", 2, "model.device = 'gpu': not a device; use cpu, cuda or auto"),
    (
        TRAIN + "--set lora.target_modules=qproj",
        2,
        "lora.target_modules: 'qproj' matches no layer (did you mean 'q_proj'?); "
        "linear layers end in down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
    ),
    (
        TRAIN + "--set lora.modules_to_save=embed_token",
        2,
        "lora.modules_to_save: 'embed_token' matches no module (did you mean 'embed_tokens'?); "
        "give endings of names, such as embed_tokens or lm_head",
    ),
    # run folders and outputs
    (
        TRAIN + "--output held",
        2,
        "held: holds a run already; --resume goes on with it, --overwrite starts anew, "
        "--output names another",
    ),
    (TRAIN + "--output rows.jsonl", 2, "rows.jsonl: is a file; name another run folder with --output"),
    (
        TRAIN + "--output rows.jsonl/run",
        2,
        "rows.jsonl/run: cannot be made (Not a directory); name another run folder with --output",
    ),
    (TRAIN + "--resume", 2, "run: no checkpoint to resume from"),
    ("chat nowhere", 2, "nowhere: not a run folder (it has no config.yaml)"),
    ("eval nowhere", 2, "nowhere: not a run folder (it has no config.yaml)"),
    ("init typo.yaml", 2, "typo.yaml: exists already; choose another name, or --force to replace it"),
    (
        "quantize model full",
        2,
        "full: exists and is not empty; choose another folder, or --overwrite",
    ),
    (
        "quantize model out --quant-type int4",
        4,
        "int4 cannot be saved: a bitsandbytes checkpoint holds nf4 or fp4 only; choose one of them",
    ),
    # arguments
    (
        "quantize model",
        2,
        "the following arguments are required: output; `fourbit quantize --help` shows how",
    ),
    ("train --modell model", 2, "unknown argument '--modell'; `fourbit train --help` lists them"),
]


@pytest.mark.parametrize(("command", "code", "message"), CASES, ids=[case[2][:50] for case in CASES])
def test_one_line_and_an_exit_code(
    fourbit: Fourbit, here: Path, command: str, code: int, message: str
) -> None:
    for name, text in FILES.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text)
    name = command.split()[0]
    found, _, error = fourbit(*command.split())
    assert error == f"fourbit {name}: error: {message}\n"
    assert found == code
    assert not (here / "run").exists()
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tran", "no command 'tran' (did you mean 'train'?)"),
        ("--jsn", "unknown option '--jsn'"),
    ],
)
def test_unknown_commands(fourbit: Fourbit, word: str, message: str) -> None:
    code, out, error = fourbit(word)
    commands = ", ".join(COMMANDS)
    assert (code, out) == (2, "")
    assert error == f"fourbit: error: {message}; commands are {commands}\n"


def test_a_choice_that_is_none_is_one_line(fourbit: Fourbit) -> None:
    code, _, error = fourbit("quantize", "model", "out", "--quant-type", "int8")
    assert code == 2
    # How the choices are quoted differs between versions of Python.
    assert error.replace("'", "") == (
        "fourbit quantize: error: argument --quant-type: invalid choice: int8 "
        "(choose from nf4, fp4, int4); `fourbit quantize --help` shows how\n"
    )


def test_in_a_process_of_its_own(here: Path) -> None:
    """The installed command's way in; libraries must add nothing to the line."""
    (here / "cut.jsonl").write_text(FILES["cut.jsonl"])
    import fourbit

    environment = {**os.environ, "PYTHONPATH": str(Path(fourbit.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "fourbit", *TRAIN.split(), "--data", "cut.jsonl"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines() == [
        "fourbit train: error: cut.jsonl:3: not valid JSON "
        "(Expecting ',' delimiter, column 15); repair the row"
    ]
    assert done.returncode == 3
    assert done.stdout == ""
