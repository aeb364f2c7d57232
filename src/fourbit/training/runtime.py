"""What a run takes before it holds a model: Python, the libraries and the code that training touches.

Measured once for a machine and its versions, in a process of its own that trains a model of next to no size,
and kept in the user's cache folder.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fourbit.errors import TrainingError
from fourbit.memory.measure import release_free_memory, resident_bytes
from fourbit.private import cache_folder, owner_only
from fourbit.processes import alone

#: What CUDA keeps on a card for a process that uses it: context, and the kernels of torch and its libraries.
CUDA_CONTEXT = 600_000_000
_TIMEOUT = 300


@owner_only()
def runtime_bytes(dtype: torch.dtype, libraries: Sequence[str] = ()) -> int:
    """Resident bytes of a process that has trained, without its model. Takes some ten seconds once.

    libraries: imported beside what every run imports
    """
    name = str(dtype).removeprefix("torch.")
    key, file = " ".join((_environment(), name, *sorted(libraries))), _cache_file()
    known: dict[str, int] = {}
    with suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
    if key not in known:
        known[key] = _measure_apart(name, libraries)
        with suppress(OSError):  # no place to keep it: measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(known), encoding="utf-8")
            partial.replace(file)
    return known[key]


def _cache_file() -> Path:
    return cache_folder() / "runtime.json"


def _environment() -> str:
    """What the figure depends on: every installed distribution, and the number of threads.

    transformers, PEFT and torch import much that they find (SciPy, bitsandbytes, Triton and with it torch's
    compiler), so what is installed beside them counts, up to 70 MB.
    """
    found = {path.name for folder in sys.path for path in Path(folder or ".").glob("*.dist-info")}
    installed = hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]
    python = ".".join(map(str, sys.version_info[:3]))
    return f"python-{python} installed-{installed} threads-{torch.get_num_threads()}"


def _measure_apart(name: str, libraries: Sequence[str]) -> int:
    given = f"{name!r}, {list(libraries)!r}"
    code = f"from fourbit.training.runtime import measure; print('resident', measure({given}))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
        env=alone(),
    )
    lines = [line for line in found.stdout.splitlines() if line.startswith("resident ")]
    if found.returncode != 0 or not lines:
        reason = (found.stderr.strip().splitlines() or ["no output"])[-1][:160]
        raise TrainingError(f"the memory of an empty run could not be measured ({reason})")
    return int(lines[-1].split()[1])


def measure(dtype: str, libraries: Sequence[str] = ()) -> int:
    """Import, load and train next to nothing in this process, and say what is resident afterwards."""
    for library in libraries:
        import_module(library)
    import transformers
    from rich.console import Console

    from fourbit.config_file import resolve
    from fourbit.training.prepare import prepare_model
    from fourbit.training.run import fit

    console = Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        _write_tiny(Path(folder), transformers)
        data = Path(folder) / "rows.jsonl"
        data.write_text('{"text": "0 1 2 3 4 5 6 7"}\n' * 4, encoding="utf-8")
        config = resolve(
            {
                "model": {"path": folder, "compute_dtype": dtype, "device": "cpu"},
                "data": {"train": str(data), "max_length": 8, "heldout_fraction": 0.25},
                "train": {"max_steps": 2, "effective_batch": 2, "micro_batch": 1},
                "output": f"{folder}/run",
            }
        )
        model, tokenizer = prepare_model(config, console)
        fit(model, tokenizer, config, console)
        del model, tokenizer
    if config.model.compute_dtype == "float32":
        _use_matrix_library()
    gc.collect()
    release_free_memory()
    return resident_bytes()


def _use_matrix_library() -> None:
    """Products of these two sizes make MKL keep 10 MB a thread, and larger ones no more (docs/log.md)."""
    weight = torch.ones(8192, 384)
    for rows in (256, 1024):
        (torch.ones(rows, 384) @ weight.t()) @ weight


def _write_tiny(folder: Path, transformers: Any) -> None:
    """A Llama of a few thousand weights, and a tokenizer of digits."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "</s>", *"0123456789"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(str(folder))
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(folder))
