"""`fourbit doctor` prints facts, and says of each fault what to do about it."""

from __future__ import annotations

import json
from importlib import metadata

import torch

from fourbit.cli.main import main
from fourbit.diagnose import Fact, Finding, Problem, machine, software
from fourbit.kernels import native
from fourbit.ops import library


def test_facts_one_line_each_and_problems_last(monkeypatch, capsys):
    finding = Finding(
        (Fact("cores", "2, some processor", 2), Fact("Python", "3.11", "3.11")), (Problem("bad", "mend"),)
    )
    monkeypatch.setattr("fourbit.cli.doctor.diagnose", lambda: finding)
    assert main(["doctor"]) == 1
    assert (
        capsys.readouterr().out == "cores   2, some processor\nPython  3.11\n\nproblem  bad\nfix      mend\n"
    )
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "facts": {"cores": 2, "Python": "3.11"},
        "problems": [{"what": "bad", "fix": "mend"}],
    }


def test_caches_are_purged_whole_and_nothing_beside_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fourbit" / "deep").mkdir(parents=True)
    (tmp_path / "fourbit" / "deep" / "file").write_bytes(bytes(1234))
    (tmp_path / "other").touch()
    (tmp_path / "fourbit" / "link").symlink_to(tmp_path / "other")
    assert main(["doctor", "--purge-caches", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"purged": str(tmp_path / "fourbit"), "bytes": 1234}
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert main(["doctor", "--purge-caches"]) == 0
    assert capsys.readouterr().out == f"removed {tmp_path / 'fourbit'}: 0 MB\n"
    (tmp_path / "fourbit").symlink_to(tmp_path)
    assert main(["doctor", "--purge-caches"]) == 2
    assert "fourbit: cannot be removed (" in capsys.readouterr().err
    assert (tmp_path / "other").exists()


def test_the_real_diagnosis_of_this_machine(capsys):
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    facts = report["facts"]
    assert code == (1 if report["problems"] else 0)
    assert facts["cores"] >= 1
    assert facts["memory"]["total"] > 1e8
    assert facts["compute dtype"] in ("bfloat16", "float32", "float16")
    if native.available():
        assert facts["native library"] == {"isa": native.isa(), "isas": list(native.isas())}
    else:
        assert any("native library" in problem["what"] for problem in report["problems"])


def test_a_card_that_a_cpu_torch_cannot_use():
    problem = software.card_problem(["NVIDIA H200"], cuda=None)
    assert problem is not None
    assert problem.what == "a card is present (NVIDIA H200) but this torch is CPU-only"
    assert "install a CUDA build" in problem.fix


def test_a_card_that_a_cuda_torch_cannot_use():
    problem = software.card_problem(["NVIDIA H200"], cuda="13.0")
    assert problem is not None
    assert "CUDA 13.0" in problem.fix


def test_no_card_is_no_problem():
    assert software.card_problem([], cuda=None) is None


def test_check_torch_reports_the_card(monkeypatch):
    monkeypatch.setattr(software, "nvidia_cards", lambda: ["NVIDIA H200"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU-only" in software.check_torch().problems[0].what


def test_a_package_outside_its_range_or_missing(monkeypatch):
    installed = {"torch": "2.10.0", "peft": "0.21.2"}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(software.metadata, "version", version)
    wanted = ["torch>=2.11", "peft>=0.19", "gguf>=0.17", "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(software.metadata, "requires", lambda name: wanted)
    finding = software.check_packages()
    assert finding.problems == (
        Problem("torch 2.10.0 is outside >=2.11", "pip install 'torch>=2.11'"),
        Problem("gguf is missing", "pip install 'gguf>=0.17'"),
    )
    assert [fact.name for fact in finding.facts] == ["fourbit", "torch", "peft", "gguf"]


def test_a_library_that_does_not_load_is_a_problem(monkeypatch):
    monkeypatch.setattr(native, "load_error", lambda: "no fourbit_native library in there")
    (problem,) = software.check_native().problems
    assert problem.what == "the native library is not there: no fourbit_native library in there"


def test_triton_is_tried_on_each_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    reasons = {0: None, 1: "its codes are not the reference's"}
    monkeypatch.setattr(library, "triton_error", lambda device: reasons[device.index])
    finding = software.check_triton()
    assert [(fact.name, fact.value) for fact in finding.facts] == [
        ("Triton on cuda:0", True),
        ("Triton on cuda:1", False),
    ]
    (problem,) = finding.problems
    assert problem.what == "Triton's kernels do not work on cuda:1: its codes are not the reference's"


def test_two_openmp_runtimes_are_named(monkeypatch):
    monkeypatch.setattr(native, "load_error", lambda: None)
    monkeypatch.setattr(native, "isas", lambda: ("scalar",))
    monkeypatch.setattr(native, "isa", lambda: "scalar")
    monkeypatch.setattr(native, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    openmp = software.check_native().facts[-1]
    assert openmp.text == "libgomp.so.1, libiomp5.so, not shared: their threads compete for the cores"


def test_cards_listed_by_the_driver(tmp_path):
    card = tmp_path / "0000:01:00.0"
    card.mkdir()
    (card / "information").write_text("Model: \t\t NVIDIA GeForce RTX 3060\nIRQ:   \t\t 150\n")
    assert machine._driver_cards(tmp_path) == ["NVIDIA GeForce RTX 3060"]


def test_a_tool_without_a_driver_lists_no_card(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    tool.chmod(0o755)
    assert machine._listed_cards(str(tool)) == []
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200'\n")
    assert machine._listed_cards(str(tool)) == ["NVIDIA H200"]
