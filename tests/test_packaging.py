"""What is promised of the wheel, the locked dependencies, and the files that the repository carries."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fourbit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ["lock.txt", "lock-dev.txt", "oldest.txt", "demo-model.txt"]
#: SHA-256 of the files as PolyAI published them.
BANKING77 = {
    "train.csv": "f7e70953e9e0a011140705587b74171d879cba20f3849f669ce1d9840b5caf11",
    "test.csv": "7eec75a184001037b70bff1322fbc84d4bf3d30b214c1f2af50659fde81c803d",
}


def pins(name):
    """Locked versions by package; the lines of a lock file are requirements, hashes or comments."""
    logical = (ROOT / "requirements" / name).read_text().replace("\\\n", " ").splitlines()
    found = {}
    for line in (line.strip() for line in logical):
        if not line or line.startswith("#"):
            continue
        requirement, *hashes = re.split(r"\s+--hash=", line)
        assert hashes, f"{name}: {line} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), line
        parsed = Requirement(requirement)
        (exact,) = parsed.specifier
        assert exact.operator == "=="
        found.setdefault(parsed.name, {})[str(parsed.marker)] = exact.version
    return found


def requirement(name):
    (found,) = (Requirement(text) for text in PROJECT["project"]["dependencies"] if text.startswith(name))
    return found


def pinned_torch(name):
    (line,) = (line for line in (ROOT / "requirements" / name).read_text().splitlines() if line[0] != "#")
    return Version(line.removeprefix("torch=="))


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_everything_by_hash_and_nothing_of_torch_or_a_machine(name):
    packages = pins(name)
    assert packages
    assert not {"torch", "triton", "fourbit"} & set(packages)
    assert not [package for package in packages if package.startswith(("nvidia-", "cuda-", "pytorch-"))]
    text = (ROOT / "requirements" / name).read_text()
    assert not re.search(r"https?://|file:|^--|^ *-[fi] | @ ", text, flags=re.MULTILINE)


def test_tools_are_locked_beside_the_same_dependencies():
    run, dev = pins("lock.txt"), pins("lock-dev.txt")
    # A tool may need one of them on more platforms, but no other version of it.
    assert {name: set(dev.get(name, {}).values()) for name in run} == {
        name: set(versions.values()) for name, versions in run.items()
    }
    assert dev["bitsandbytes"] == {"None": "0.50.2"}


def test_torch_is_open_at_the_top_and_its_pins_agree():
    (bound,) = requirement("torch").specifier
    assert bound.operator == ">="
    assert pinned_torch("oldest-torch.txt") == Version(bound.version)
    assert bound.contains(pinned_torch("torch.txt"))
    assert "torch" not in " ".join(PROJECT["build-system"]["requires"])


def test_the_oldest_lock_holds_the_lower_bounds():
    oldest = pins("oldest.txt")
    for name in (
        "transformers",
        "peft",
        "accelerate",
        "psutil",
        "safetensors",
        "gguf",
        "pydantic",
        "rich",
        "pyyaml",
    ):
        (lower,) = (spec.version for spec in requirement(name).specifier if spec.operator == ">=")
        assert {Version(version) for version in oldest[name].values()} == {Version(lower)}, name


def test_the_makefile_accepts_the_torch_that_the_package_accepts(tmp_path):
    """requirements/has_torch.py runs before anything is installed, so it repeats the bound."""
    script = ROOT / "requirements" / "has_torch.py"
    for version, accepted in {"2.10.1": False, "2.11.0+cu130": True, "2.13.0": True, "3.0.0a1": True}.items():
        info = tmp_path / version / "torch.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        environment = {**os.environ, "PYTHONPATH": str(info.parent)}
        done = subprocess.run(
            [sys.executable, script], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) is accepted, version
        assert done.stdout.strip() == (version if accepted else "")
        assert requirement("torch").specifier.contains(version, prereleases=True) is accepted


def test_the_data_set_is_the_one_described_and_attributed():
    folder = ROOT / "demo" / "banking77"
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in BANKING77} == BANKING77
    for text in ((folder / "SOURCE.md").read_text(), (ROOT / "NOTICE").read_text()):
        assert "PolyAI" in text
        assert "Attribution 4.0 International" in text


def build_wheel(folder, **environment):
    """Build the wheel from a copy of the sources, with what is installed here."""
    source, out = folder / "source", folder / "out"
    source.mkdir()
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--wheel-dir", out, source]
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("pure"), CXX="/bin/false")


@pytest.mark.slow  # `make test` has built the same library already
def test_one_wheel_for_every_python_of_a_platform(wheel):
    assert re.fullmatch(rf"fourbit-{fourbit.__version__}-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (library,) = (name for name in names if re.search(r"\.(so|dylib|dll|pyd)\b", name))
        content = archive.read(library)
        metadata = archive.read(f"fourbit-{fourbit.__version__}.dist-info/METADATA").decode()
    assert library.startswith("fourbit/fourbit_native")
    assert b"libtorch" not in content
    assert b"libpython" not in content
    assert not [name for name in names if "gomp" in name or name.startswith(("demo", "tests", "csrc"))]
    assert "fourbit/py.typed" in names
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Version: {fourbit.__version__}\n" in metadata


def test_without_a_compiler_a_pure_wheel_runs_on_the_reference_with_one_notice(pure_wheel, tmp_path):
    assert pure_wheel.name == f"fourbit-{fourbit.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import torch, fourbit.functional as F4\n"
        "w = torch.linspace(-1, 1, 640).reshape(10, 64)\n"
        "for _ in range(3):\n"
        "    q = F4.quantize_4bit(w)\n"
        "    error = (F4.dequantize_4bit(q) - w).abs().max()\n"
        "    print(F4.linear_4bit(torch.ones(1, 64), q).shape, bool(error < 0.2))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FOURBIT_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "torch.Size([1, 10]) True\n" * 3
    (notice,) = done.stderr.splitlines()
    assert "the native library is not used" in notice


def test_the_layers_contract_names_every_module():
    (contract,) = (one for one in PROJECT["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    named = set(re.findall(r"\w+", " ".join(contract["layers"])))
    package = ROOT / "src" / "fourbit"
    present = {
        path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert present - {"__init__", "kernels"} <= named
