"""GPTQ and AWQ exports: what is refused before anything starts, the worker's protocol, and one real run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourbit.config_file import load_config
from fourbit.errors import ConfigError, ExportError, ModelError
from fourbit.exporting import environment
from fourbit.exporting.compressed import choose_group_size, linear_layers, quantize_for_serving
from fourbit.exporting.environment import (
    REQUIREMENTS,
    check_environment,
    default_folder,
    find_environment,
    interpreter,
    make_environment,
)
from fourbit.exporting.readers import TorchReader, open_reader
from tests.tiny import byte_tokenizer, llama, save_llama

ROWS = [byte_tokenizer()(f"color {number}?" * 3)["input_ids"] for number in range(8)]

#: An interpreter without llm-compressor that does as if: WORK is what it does in the worker's place.
FAKE = """#!{python}
import json, os, signal, sys
from pathlib import Path
if sys.argv[1] == "-c":
    print({probe!r})
    sys.exit(0)
request = json.loads(Path(sys.argv[2]).read_text())
output = Path(request["output"])
def say(**message):
    print(json.dumps(message), flush=True)
{work}
"""
DONE = """
output.mkdir()
(output / "model.safetensors").write_bytes(b"x" * 77)
(output / "config.json").write_text(json.dumps(request))
say(layers=14, versions={"llmcompressor": "0.14.9"})
"""


def fake(folder: Path, work: str = DONE, probe: str = '{"llmcompressor": "0.14.9"}') -> Path:
    path = folder / "fake-python"
    path.write_text(FAKE.format(python=sys.executable, work=work, probe=probe))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "model")


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"fake-python"}


@pytest.mark.parametrize(("method", "wanted", "size"), [("gptq", None, 64), ("awq", 32, 32)])
def test_the_worker_is_asked_and_its_folder_completed(
    method: str, wanted: int | None, size: int, model: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    work = (
        "print('loading', flush=True)\nprint(3, flush=True)\nsay(done=1, total=2)\nsay(done=2, total=2)"
        + DONE
    )
    result = quantize_for_serving(
        model,
        tmp_path / "new" / "out",
        ROWS,
        method=method,
        group_size=wanted,
        python=fake(tmp_path, work),
        progress=lambda *at: seen.append(at),
    )
    assert (result.method, result.group_size, result.layers, result.bytes) == (method, size, 14, 77)
    assert result.versions == {"llmcompressor": "0.14.9"}
    assert result.command == f"vllm serve {tmp_path / 'new' / 'out'}"
    assert seen == [(method, 1, 2), (method, 2, 2)]
    out = tmp_path / "new" / "out"
    request = json.loads((out / "config.json").read_text())
    assert request["calibration"] == ROWS
    assert (request["method"], request["group_size"], request["ignore"]) == (method, size, ["lm_head"])
    assert request["folder"] == str(model.resolve())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert left(tmp_path / "new") == {"out"}  # no temporary folder, no log


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("say(error='ValueError: no such layer'); sys.exit(1)", r"failed \(ValueError: no such layer\)"),
        ("print('oh', file=sys.stderr); sys.exit(3)", r"failed \(stopped without a word, exit code 3\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"failed \(stopped without a word, signal 9; out of memory"),
        ("pass", r"failed \(stopped without a word, exit code 0\)"),
    ],
)
def test_a_worker_that_fails_is_one_line_and_leaves_its_log(
    work: str, message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        quantize_for_serving(model, tmp_path / "out", ROWS, python=fake(tmp_path, work))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"what it printed is in {tmp_path / 'out.log'}")
    assert left(tmp_path) == {"out.log"}
    assert (tmp_path / "out.log").read_text() == ("oh\n" if "oh" in work else "")


def test_a_model_quantized_in_part_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="quantized 7 of 14 linear layers"):
        quantize_for_serving(
            model, tmp_path / "out", ROWS, python=fake(tmp_path, DONE.replace("layers=14", "layers=7"))
        )
    assert left(tmp_path) == set()


def test_an_interrupt_ends_the_worker(model: Path, tmp_path: Path) -> None:
    work = (
        "(output.parent.parent / 'pid').write_text(str(os.getpid())); say(done=1, total=9)\nwhile True: pass"
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_for_serving(model, tmp_path / "out", ROWS, python=fake(tmp_path, work), progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert left(tmp_path) == {"pid"}


def test_what_is_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    never = tmp_path / "never"  # no interpreter: an error of it would say that it was looked at first
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="method = 'rtn': use gptq or awq"):
        quantize_for_serving(model, tmp_path / "out", ROWS, method="rtn", python=never)
    with pytest.raises(ConfigError, match="gptq is calibrated on rows, and there are none"):
        quantize_for_serving(model, tmp_path / "out", [], python=never)
    with pytest.raises(ConfigError, match="full: exists and is not empty"):
        quantize_for_serving(model, full, ROWS, python=never)
    with pytest.raises(ConfigError, match=r"group size 128 does not divide the 64 inputs of .*_proj; use 64"):
        quantize_for_serving(model, tmp_path / "out", ROWS, group_size=128, python=never)
    with pytest.raises(ModelError, match=r"full: no config.json here"):
        quantize_for_serving(full, tmp_path / "out", ROWS, python=never)
    with pytest.raises(ExportError, match=r"never: is not a Python that runs \(No such file or directory\)"):
        quantize_for_serving(model, tmp_path / "out", ROWS, python=never)
    assert left(tmp_path) == {"full"}


def test_a_model_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"packed: is already quantized; give the 16-bit model"):
        linear_layers(packed)
    (packed / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ModelError, match=r"packed: cannot be read \("):
        linear_layers(packed)


def test_the_layers_of_a_folder(model: Path) -> None:
    layers, head = linear_layers(model)
    assert head == "lm_head"
    assert len(layers) == 14
    assert layers["model.layers.1.mlp.down_proj"] == 128
    assert layers["model.layers.0.self_attn.q_proj"] == 64


@pytest.mark.parametrize(
    ("inputs", "wanted", "found"),
    [((128, 256), None, 128), ((576, 1536), None, 64), ((96, 128), None, 32), ((576, 1536), 32, 32)],
)
def test_group_sizes(inputs: tuple[int, int], wanted: int | None, found: int) -> None:
    assert choose_group_size({"a": inputs[0], "b": inputs[1]}, wanted) == found


@pytest.mark.parametrize(
    ("inputs", "wanted", "message"),
    [
        (576, 128, "group size 128 does not divide the 576 inputs of a; use 64"),
        (576, 48, "group size 48: serving engines read 128, 64, 32"),
        (
            100,
            None,
            "group size 32 does not divide the 100 inputs of a; none of 128, 64, 32 divides them all",
        ),
        (100, 64, "group size 64 does not divide the 100 inputs of a; none of"),
    ],
)
def test_group_sizes_that_do_not_fit(inputs: int, wanted: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_group_size({"b": 1024, "a": inputs}, wanted)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("{}", r"has no llm-compressor; .* -m pip install -r .*llmcompressor.txt$"),
        ('{"llmcompressor": "0.9.0"}', r"has llm-compressor 0\.9\.0, and 0\.14 is needed; .* install -r "),
        ("words", r"is not a Python that runs \(it said nothing\)"),
    ],
)
def test_an_environment_that_will_not_do(probe: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        check_environment(fake(tmp_path, probe=probe))


def test_a_file_that_is_no_interpreter(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("words")
    with pytest.raises(ExportError, match=r"python: is not a Python that runs \(Permission denied\)"):
        check_environment(tmp_path / "python")


def test_without_an_environment_the_way_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FOURBIT_LLMCOMPRESSOR", raising=False)
    assert default_folder() == tmp_path / "fourbit" / "llmcompressor"
    with pytest.raises(ExportError, match=r"none in .*llmcompressor: --install .* set FOURBIT_LLMCOMPRESSOR"):
        find_environment()
    asked: list[str] = []
    monkeypatch.setattr(environment, "make_environment", lambda progress: asked.append("make"))
    find_environment(install=True)
    interpreter(default_folder()).parent.mkdir(parents=True)
    fake(tmp_path, probe="{}").rename(interpreter(default_folder()))  # pip was interrupted
    with pytest.raises(ExportError, match="has no llm-compressor"):
        find_environment()
    find_environment(install=True)
    assert asked == ["make", "make"]
    fake(tmp_path).rename(interpreter(default_folder()))
    assert find_environment(install=True).versions == {"llmcompressor": "0.14.9"}
    assert asked == ["make", "make"]
    monkeypatch.setenv("FOURBIT_LLMCOMPRESSOR", str(fake(tmp_path, probe='{"llmcompressor": "0.14.3"}')))
    assert find_environment().versions == {"llmcompressor": "0.14.3"}
    assert find_environment(interpreter(default_folder())).versions == {"llmcompressor": "0.14.9"}


#: Makes an "environment" of itself, and installs the packages unless their list says otherwise.
INSTALLER = """#!{python}
import shutil, sys
from pathlib import Path
if sys.argv[1:3] == ["-m", "venv"]:
    (Path(sys.argv[3]) / "bin").mkdir(parents=True)
    shutil.copy(__file__, Path(sys.argv[3]) / "bin" / "python")
elif sys.argv[1:3] == ["-m", "pip"]:
    wanted = Path(sys.argv[-1]).read_text()
    (Path(__file__).parent / "installed").write_text(wanted)
    sys.exit("ERROR: no such package" if "nothing" in wanted else 0)
else:
    print('{{"llmcompressor": "0.14.1"}}')
"""


def test_making_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer = tmp_path / "installer"
    installer.write_text(INSTALLER.format(python=sys.executable))
    installer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(installer))
    seen: list[tuple[str, int, int]] = []
    made = make_environment(tmp_path / "made", lambda *at: seen.append(at))
    assert (made.python, made.versions) == (tmp_path / "made/bin/python", {"llmcompressor": "0.14.1"})
    assert (tmp_path / "made/bin/installed").read_text() == REQUIREMENTS.read_text()
    assert seen == [("environment", done, 2) for done in (0, 1, 2)]

    (tmp_path / "list.txt").write_text("nothing==0")
    monkeypatch.setattr(environment, "REQUIREMENTS", tmp_path / "list.txt")
    with pytest.raises(ExportError, match=r"other: cannot be made an environment \(ERROR: no such package\)"):
        make_environment(tmp_path / "other")
    with pytest.raises(ExportError, match="cannot be made an environment"):
        make_environment(installer)


def test_the_list_of_packages_names_the_release_that_the_worker_is_for() -> None:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert any(line.startswith(f"llmcompressor=={environment.LLMCOMPRESSOR}.") for line in lines)
    assert all("==" in line for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_gptq_and_awq_by_llm_compressor_itself(tmp_path: Path) -> None:
    """Makes the environment from the package index, quantizes, and reads back with compressed-tensors."""
    made = make_environment(tmp_path / "environment")
    source = save_llama(tmp_path / "model", dtype=torch.float32, tied=False)
    options = [f"model.path={source}", "model.compute_dtype=float32", "data.train=rows.jsonl"]
    settings = load_config(None, options).model
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        before = llama(tied=False)(input_ids=ids).logits
    for method in ("gptq", "awq"):
        result = quantize_for_serving(source, tmp_path / method, ROWS, method=method, python=made.python)
        assert (result.layers, result.group_size) == (14, 64)
        stored = load_file(str(tmp_path / method / "model.safetensors"))
        assert stored["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
        assert stored["lm_head.weight"].dtype == torch.float32
        assert ("model.layers.0.mlp.up_proj.weight_zero_point" in stored) is (method == "awq")
        reader = open_reader(tmp_path / method, settings)
        assert isinstance(reader, TorchReader)
        assert reader.tokenize(["color"]) == [byte_tokenizer()("color")["input_ids"]]
        with torch.no_grad():
            after = reader.model(input_ids=ids).logits
        error = (after - before).norm() / before.norm()
        assert 0.001 < error < 0.2
