"""Fuzz fourbit's parsers: `python fuzz/run.py TARGET... --runs N`, or `all`.

With atheris installed (`pip install atheris`) its libFuzzer is guided by the coverage of fourbit, and of
gguf, PyYAML and transformers' GGUF and template code. Without it, or with --plain, the inputs are seeded
mutations of the corpus. A crash is kept in fuzz/found/ and ends the target; the exit code is then 1.

    python fuzz/run.py all --runs 10000
    python fuzz/run.py gguf --plain --runs 5000 --seed 7
    python fuzz/run.py gguf --input fuzz/found/gguf-...        one input again, with its traceback
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
FOUND = HERE / "found"
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "src")]

#: Seconds after which an input counts as a hang, and MiB that none may need.
HANG, MEMORY = 20, 2500
_INSTRUMENTED = [
    "fourbit.config", "fourbit.config_file", "fourbit.limits", "fourbit.data", "fourbit.model",
    "fourbit.exporting.adapter", "fourbit.exporting.provenance", "fourbit.report.curves",
    "fourbit.training.checkpoint", "gguf", "yaml",
    "transformers.modeling_gguf_pytorch_utils", "transformers.utils.chat_template_utils",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="names, or all")
    parser.add_argument(
        "--runs", type=int, default=10_000, help="inputs for each target (a tenth for slow ones)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--plain", action="store_true", help="seeded mutations, also where atheris is installed"
    )
    parser.add_argument("--input", type=Path, help="run this one file")
    parser.add_argument("--guided", action="store_true", help=argparse.SUPPRESS)  # the child of `_guided`
    args = parser.parse_args()
    if args.guided:
        return _fuzz_here(args.targets[0], args.runs, args.seed)
    _quiet()
    from fuzz.targets import TARGETS, run_one

    names = list(TARGETS) if args.targets == ["all"] else args.targets
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no target {unknown[0]}; there are {', '.join(TARGETS)}")
    if args.input:
        with tempfile.TemporaryDirectory() as folder:
            taken = run_one(TARGETS[names[0]], args.input.read_bytes(), Path(folder) / "x")
        print("taken" if taken else "refused in one line")
        return 0
    guided = find_spec("atheris") is not None and not args.plain
    print(f"{'target':<16} {'inputs':>8} {'seconds':>8}  {'guided by coverage' if guided else 'mutations'}")
    inputs = failed = 0
    for name in names:
        runs = args.runs // 10 if TARGETS[name].slow else args.runs
        began = time.monotonic()
        done, failure = (_guided if guided else _mutations)(name, runs, args.seed)
        print(
            f"{name:<16} {done:>8,} {time.monotonic() - began:>8.1f}  {failure or 'no crash, no hang'}",
            flush=True,
        )
        inputs, failed = inputs + done, failed + bool(failure)
    print(f"{'all':<16} {inputs:>8,}           {failed} of {len(names)} targets failed")
    return 1 if failed else 0


def _quiet() -> None:
    """What libraries say of strange input would bury the results; endless templates get less time."""
    from fourbit import limits

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    limits.SECONDS, limits.MEMORY, limits._LOOK_EVERY = 0.2, 256 << 20, 0.05


def _mutations(name: str, runs: int, seed: int) -> tuple[int, str]:
    from fuzz.mutate import mutated
    from fuzz.targets import TARGETS, corpus, run_one

    seeds = corpus(name)
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate((*seeds, *mutated(seeds, runs, seed)), start=1):
            began = time.monotonic()
            try:
                run_one(TARGETS[name], data, Path(folder) / "x")
                problem = "hang" if time.monotonic() - began > HANG else ""
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"[:200]
            if problem:
                return number, f"{problem} ({_keep(name, data)})"
    return len(seeds) + runs, ""


def _guided(name: str, runs: int, seed: int) -> tuple[int, str]:
    """libFuzzer ends its process, so each target has one of its own."""
    command = [sys.executable, __file__, name, "--guided", "--runs", str(runs), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    counts = re.findall(r"^(?:Done |#)(\d+)", done.stderr, re.MULTILINE)
    if done.returncode == 0:
        return int(counts[-1]), ""
    reason = re.findall(r"^\S*(?:Error|Exception|SUMMARY)\b.*", done.stderr, re.MULTILINE)
    kept = re.findall(r"written to (\S+)", done.stderr)
    (FOUND / f"{name}.log").write_text(done.stderr)
    return int(counts[-1]) if counts else 0, f"{(reason or ['crash'])[0][:200]} ({(kept or ['no file'])[0]})"


def _fuzz_here(name: str, runs: int, seed: int) -> int:
    import atheris

    with atheris.instrument_imports(include=_INSTRUMENTED, enable_loader_override=False):
        from fuzz.targets import CORPUS, TARGETS, run_one
    _quiet()
    FOUND.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        grown = Path(folder) / "corpus"
        grown.mkdir()

        def one(data: bytes) -> None:
            run_one(TARGETS[name], data, Path(folder) / "x")

        options = [
            f"-runs={runs}", f"-seed={seed}", f"-timeout={HANG}", f"-rss_limit_mb={MEMORY}", "-max_len=65536",
            "-detect_leaks=0", f"-artifact_prefix={FOUND}/{name}-", str(grown), str(CORPUS / name),
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options], one)
        atheris.Fuzz()
    return 0


def _keep(name: str, data: bytes) -> Path:
    FOUND.mkdir(exist_ok=True)
    file = FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    file.write_bytes(data)
    return file


if __name__ == "__main__":
    sys.exit(main())
