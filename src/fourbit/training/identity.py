"""What a run is made of, and whether going on with it would still be the same run.

A checkpoint records the settings and the identity of its run: hashes of the base and of the encoded rows,
device, threads, instruction set, versions. `--resume` compares them with what it finds. The rule: a setting
may change where a run under the new settings would have come through this very checkpoint. So these may:

- what writes more or less: tensorboard, trackers, keep_checkpoints; and where things lie: model.weight_tier,
  activation_tier, optimizer_memory
- paths, and every setting of the data, while base and rows are the same by content
- epochs, max_steps, warmup_ratio, schedule, learning_rate, while no finished step's learning rate changes
  and the end is not before the checkpoint (so more steps under a constant schedule without warmup)
- early_stop_patience, to a larger number or none
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from fourbit.config import RunConfig
from fourbit.data.examples import Examples, packed_tokens
from fourbit.data.render import Example
from fourbit.diagnose.machine import check_cores
from fourbit.exporting.provenance import versions
from fourbit.kernels import native
from fourbit.memory.stream import stream_of
from fourbit.processes import join
from fourbit.training.checkpoint import State
from fourbit.training.schedule import learning_rate

_LIBRARIES = ("fourbit", "torch", "transformers", "peft")
_SECTIONS = ("model", "lora", "data", "train")
_MAY_CHANGE = (
    "model.weight_tier",
    "train.tensorboard",
    "train.trackers",
    "train.keep_checkpoints",
    "train.activation_tier",
    "train.compact_heap",  # of earlier versions
    "train.shard_weights",
    "train.optimizer_memory",
)
_BASE = ("model.path", "model.revision", "model.quant_type", "model.block_size", "model.double_quant")
#: What is compared by content or as resolved, and how the names of the settings begin that choose it.
_CHOSEN_BY: dict[str, tuple[str, ...]] = {
    "base": (*_BASE, "model.compute_dtype"),  # what is not in 4 bits is held in it
    "adapter": ("lora",),
    "train_rows": ("data.", "train.seed"),
    "heldout_rows": ("data.", "train.seed"),
    "compute_dtype": ("model.compute_dtype",),
    "device": ("model.device",),
    **dict.fromkeys(("threads", "instruction_set", *_LIBRARIES), ("nothing",)),
}
_BY_CONTENT = (*_BASE, "model.compute_dtype", "model.device", "data.")
_SCHEDULE = tuple(
    f"train.{key}" for key in ("epochs", "max_steps", "learning_rate", "schedule", "warmup_ratio")
)
_NAMES = {
    "base": "the content of model.path",
    "train_rows": "the content of data.train",
    "heldout_rows": "the content of the held-out rows",
    "adapter": "the adapter's configuration",
    "compute_dtype": "the compute dtype",
    "threads": "the number of threads",
    "instruction_set": "the instruction set",
}
#: These need not change a result, and may: said, not refused.
_REMARKED = {"processor": "the processor", "code": "fourbit's code", "processes": "the number of processes"}
#: Variables that make the libraries take other kernels than the processor's best.
_KERNEL_CHOICES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
_PEFT_IGNORED = {"base_model_name_or_path", "inference_mode", "revision", "peft_version"}


@dataclass(frozen=True)
class Record:
    """What checkpoints say of their run: its settings, and its identity, both as plain values."""

    settings: dict[str, Any]
    identity: dict[str, Any]


def describe(
    config: RunConfig,
    model: nn.Module,
    train: Sequence[Example],
    heldout: Sequence[Example],
    *,
    peak_rate: float,
    steps: int,
    autocast_dtype: torch.dtype | None,
) -> Record:
    """The record of a run about to start; hashes every frozen weight and every row."""
    parameter = next(model.parameters())
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = versions()
    settings = config.model_dump(mode="json", include=set(_SECTIONS))
    identity = {
        "base": weights_hash(model),
        "train_rows": rows_hash(train),
        "heldout_rows": rows_hash(heldout),
        "adapter": _adapter(model),
        "compute_dtype": str(autocast_dtype or base.dtype).removeprefix("torch."),
        "device": _device(parameter.device),
        "threads": torch.get_num_threads(),
        "processes": join().size,
        "instruction_set": _instruction_set(),
        "peak_rate": peak_rate,
        "steps": steps,
        "processor": check_cores().facts[0].text,
        "code": found["code"],
        **{library: found[library] for library in _LIBRARIES},
    }
    return Record(settings, identity)


def differences(stored: State, now: Record) -> list[str]:
    """What keeps a checkpoint's run from going on as `now` describes, in words; empty if nothing does."""
    old, new = stored.settings, now.settings
    changed = _changed_settings(old, new)
    found: list[str] = []
    for key, prefixes in _CHOSEN_BY.items():
        if stored.identity.get(key) != now.identity[key]:
            chosen = [name for name in changed if name.startswith(prefixes)]
            found += [_differs(name, old, new) for name in chosen] or [_identity_differs(key, stored, now)]
    for name in changed:
        patient = name == "train.early_stop_patience" and _is_more_patient(old, new)
        if not (name.startswith(_BY_CONTENT) or name in (*_MAY_CHANGE, *_SCHEDULE) or patient):
            found.append(_differs(name, old, new))
    found += _schedule_differences(stored, now, [name for name in changed if name in _SCHEDULE])
    return list(dict.fromkeys(found))


def remarks(stored: State, now: Record) -> list[str]:
    """What a person should know of a resumed run that is not refused."""
    found = [
        f"{name} is another one than when the run began; if its sums round differently, so will the run"
        for key, name in _REMARKED.items()
        # Runs of earlier versions had one process, and do not say so.
        if stored.identity.get(key, 1 if key == "processes" else None) != now.identity[key]
    ]
    progress, steps = stored.progress, stored.identity["steps"]
    ended = progress.step == progress.evaluated_step == steps
    if ended and now.identity["steps"] > steps and steps % now.settings["train"]["eval_every"]:
        found.append(f"going on after step {steps}, where the run ended before: its evaluation there stays")
    return found


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the weights that a run starts from and never changes; of all without an adapter.

    Of what is in memory: the same for a base read from another folder or format, if its bytes are.
    """
    frozen, stream = isinstance(model, PeftModel), stream_of(model)
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if frozen and tensor.requires_grad:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
        if stream is not None:
            stream.release([tensor])
    return digest.hexdigest()


def rows_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of encoded rows: tokens, masks and numbers, in order."""
    digest = hashlib.sha256()
    for place in range(len(examples)):
        if isinstance(examples, Examples):  # tokens as they are kept, without a list of them
            row, words = int(examples.numbers[place]), examples.words(place)
        else:
            row, words = examples[place].row, packed_tokens(examples[place])
        digest.update(struct.pack("<qq", row, len(words)))
        digest.update(words.tobytes())
    return digest.hexdigest()


def _schedule_differences(stored: State, now: Record, changed: list[str]) -> list[str]:
    step = stored.progress.step
    if now.identity["steps"] < step:
        why = f", which ends before the {step:,} steps already done"
    elif _rates(stored.settings, stored.identity, step) != _rates(now.settings, now.identity, step):
        why = ", which changes the learning rate of steps already done"
    else:
        return []
    return [_differs(name, stored.settings, now.settings) + why for name in changed]


def _rates(settings: dict[str, Any], identity: dict[str, Any], steps: int) -> list[float]:
    train = settings["train"]
    return [
        learning_rate(
            step, identity["steps"], identity["peak_rate"], train["warmup_ratio"], train["schedule"]
        )
        for step in range(steps)
    ]


def _is_more_patient(old: dict[str, Any], new: dict[str, Any]) -> bool:
    before, after = old["train"]["early_stop_patience"], new["train"]["early_stop_patience"]
    return after is None or (before is not None and after >= before)


def _changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changed = []
    for section in _SECTIONS:
        if old[section] is None or new[section] is None:
            changed += [section] if old[section] != new[section] else []
            continue
        keys = [*new[section], *(key for key in old[section] if key not in new[section])]
        changed += [
            f"{section}.{key}" for key in keys if _value(old, section, key) != _value(new, section, key)
        ]
    return changed


def _value(settings: dict[str, Any], section: str, key: str) -> Any:
    return settings[section].get(key)


def _differs(name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    section, _, key = name.partition(".")
    if not key:
        return f"{name} differs from the run's"
    return f"{name} differs from the run's ({_value(old, section, key)}, now {_value(new, section, key)})"


def _identity_differs(key: str, stored: State, now: Record) -> str:
    name = _NAMES.get(key, f"the version of {key}" if key in _LIBRARIES else f"the {key}")
    if key in ("base", "train_rows", "heldout_rows", "adapter"):  # hashes say nothing to a person
        return f"{name} differs from the run's"
    return f"{name} differs from the run's ({stored.identity.get(key)}, now {now.identity[key]})"


def _adapter(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config[model.active_adapter].to_dict()
    return {key: _plain(value) for key, value in sorted(config.items()) if key not in _PEFT_IGNORED}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(str(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _instruction_set() -> str:
    own = native.isa() if native.available() else "reference"
    forced = "".join(f", {name}={os.environ[name]}" for name in _KERNEL_CHOICES if name in os.environ)
    return f"{own}, torch {torch.backends.cpu.get_cpu_capability()}{forced}"


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
