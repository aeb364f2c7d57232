"""The installation: versions against what fourbit supports, torch and its cards, the native library."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement

import fourbit
from fourbit.diagnose.finding import Fact, Finding, Problem
from fourbit.diagnose.machine import nvidia_cards

_GET_TORCH = "https://pytorch.org/get-started/locally"


def check_packages() -> Finding:
    """Every dependency and its version, against the range in fourbit's own metadata."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("fourbit") or ()]
    except metadata.PackageNotFoundError:
        text = (
            f"{fourbit.__version__} from {Path(fourbit.__file__).parent} (not installed: no ranges to check)"
        )
        return Finding((Fact("fourbit", text, fourbit.__version__),))
    facts = [
        Fact("fourbit", f"{fourbit.__version__} in {Path(fourbit.__file__).parent}", fourbit.__version__)
    ]
    problems = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fact, problem = _check_package(requirement)
        facts.append(fact)
        problems += [problem] if problem else []
    return Finding(tuple(facts), tuple(problems))


def check_torch() -> Finding:
    """Which torch build this is, whether it sees the cards that are there, and its threads."""
    torch, problem = _import_torch()
    if torch is None:
        return Finding((Fact("torch build", "cannot be imported", None),), (problem,) if problem else ())
    cuda, sees = torch.version.cuda, torch.cuda.is_available()
    build = f"CUDA {cuda}" if cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"
    facts = [
        Fact("torch build", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads", build),
        *(_device_fact(torch, index) for index in range(torch.cuda.device_count() if sees else 0)),
    ]
    problem = None if sees else card_problem(nvidia_cards(), cuda)
    return Finding(tuple(facts), (problem,) if problem else ())


def card_problem(cards: list[str], cuda: str | None) -> Problem | None:
    """Why torch sees none of the cards that the driver lists, or None where there is no card."""
    if not cards:
        return None
    if cuda is None:
        return Problem(
            f"a card is present ({', '.join(cards)}) but this torch is CPU-only",
            f"pip uninstall torch, then install a CUDA build: {_GET_TORCH} names the command",
        )
    return Problem(
        f"a card is present ({', '.join(cards)}) but torch cannot use it",
        f"this torch needs a driver for CUDA {cuda}: see what `nvidia-smi` says, then update the driver or "
        "install a torch for an older CUDA; check too that CUDA_VISIBLE_DEVICES is not set to nothing",
    )


def check_native() -> Finding:
    """Whether the C++ library is loaded, its instruction set, and whose OpenMP runtime it runs on."""
    torch, _ = _import_torch()
    if torch is None:
        return Finding((Fact("native library", "not loaded, since torch is not", None),))
    from fourbit.kernels import native

    if (reason := native.load_error()) is not None:
        fact = Fact("native library", "not loaded: everything runs on the reference, in plain torch", None)
        problem = Problem(
            f"the native library is not there: {reason}",
            "install a C++ compiler (Debian: apt install g++), then install fourbit again from its source "
            "with `pip install --force-reinstall --no-deps .`",
        )
        return Finding((fact,), (problem,))
    isas, chosen = native.isas(), native.isa()
    text = f"loaded, {chosen} of {', '.join(isas)}"
    fact = Fact("native library", text, {"isa": chosen, "isas": list(isas)})
    return Finding((fact, *_openmp_facts(native.openmp_runtimes())))


def check_triton() -> Finding:
    """Whether Triton's kernels work on the cards that torch sees, by trying one on each."""
    torch, _ = _import_torch()
    if torch is None or not torch.cuda.is_available():
        return Finding()
    from fourbit.ops.library import triton_error

    facts, problems = [], []
    for index in range(torch.cuda.device_count()):
        reason = triton_error(torch.device("cuda", index))
        name = f"Triton on cuda:{index}"
        if reason is None:
            facts.append(Fact(name, "works: quantizing gave the reference's bytes", True))
        else:
            facts.append(Fact(name, "not used: the reference runs instead, in plain torch, slower", False))
            what = f"Triton's kernels do not work on cuda:{index}: {reason}"
            problems.append(Problem(what, "install the Triton that this torch asks for: `pip show torch`"))
    return Finding(tuple(facts), tuple(problems))


def check_compute() -> Finding:
    """The dtype that `compute_dtype: auto` takes here, by the measurement that training makes too."""
    torch, _ = _import_torch()
    if torch is None:
        return Finding()
    from fourbit.model.compute import choose_compute_dtype, choose_device

    choice = choose_compute_dtype("auto", choose_device("auto"))
    name = str(choice.dtype).removeprefix("torch.")
    return Finding((Fact("compute dtype", f"{name}: {choice.reason}", name),))


def _check_package(requirement: Requirement) -> tuple[Fact, Problem | None]:
    wanted = str(requirement.specifier) or "any version"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        fact = Fact(requirement.name, f"missing (needs {wanted})", None)
        return fact, Problem(f"{requirement.name} is missing", f"pip install '{requirement}'")
    fact = Fact(requirement.name, f"{version} (needs {wanted})", version)
    if requirement.specifier.contains(version, prereleases=True):
        return fact, None
    what = f"{requirement.name} {version} is outside {wanted}"
    return fact, Problem(what, f"pip install '{requirement}'")


def _import_torch() -> tuple[ModuleType | None, Problem | None]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch does not load
        return None, Problem(
            f"torch cannot be imported: {error}", f"install it again: {_GET_TORCH} names the command"
        )
    return torch, None


def _device_fact(torch: ModuleType, index: int) -> Fact:
    card = torch.cuda.get_device_properties(index)
    text = f"{card.name}, {card.total_memory / 1e9:.1f} GB, compute capability {card.major}.{card.minor}"
    return Fact(f"torch device cuda:{index}", text, {"name": card.name, "memory": card.total_memory})


def _openmp_facts(runtimes: list[str]) -> tuple[Fact, ...]:
    if not runtimes:
        return ()
    names = ", ".join(Path(runtime).name for runtime in runtimes)
    shared = "shared with torch" if len(runtimes) == 1 else "not shared: their threads compete for the cores"
    return (Fact("OpenMP", f"{names}, {shared}", runtimes),)
