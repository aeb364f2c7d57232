"""A base opened but not read: where it lies, its names and shapes, and its tensors on demand.

`fourbit.load` builds a model from this; what merges or exports streams through it without one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fourbit.errors import FourBitError, ModelError
from fourbit.limits import parse_json
from fourbit.model import sizes
from fourbit.model.finite import check_finite
from fourbit.model.formats import bnb, gguf, hf, own
from fourbit.model.formats.lazy import LazyStack, LazyTensor
from fourbit.model.packed_folder import restored_own
from fourbit.model.quantizer import FourBitQuantizer, experts_names, linear_names
from fourbit.model.stacks import stacked
from fourbit.nn.experts import STACKS
from fourbit.nn.linear import is_transposed


@dataclass(frozen=True)
class Base:
    """An opened base.

    path      its folder or .gguf file
    config    without quantization_config
    skeleton  the model on the meta device
    tensors   every weight in 16 or 32 bits, by the skeleton's name; 4-bit ones are restored to fp32
    scheme    how the checkpoint is quantized, or None for 16-bit and GGUF weights
    renamed   names in the file of tensors that have another in the model, by the latter
    """

    path: Path
    config: PretrainedConfig
    skeleton: PreTrainedModel
    tensors: dict[str, LazyTensor]
    scheme: bnb.BnbScheme | None
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    @property
    def tied(self) -> dict[str, str]:
        """Weights that are another one: name -> name of the one that is stored."""
        return dict(self.skeleton.all_tied_weights_keys)


def open_base(
    path: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False
) -> Base:
    """Open a folder, hub name, bitsandbytes 4-bit checkpoint or .gguf file without reading its weights.

    Raises ModelError for what cannot be read, is quantized otherwise, or lacks weights.
    """
    place = locate(os.fspath(path), revision)
    config = read_config(place, place.is_file(), trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    check_readable(os.fspath(path), stored)
    scheme, renamed = None, dict[str, str]()
    if stored is not None:
        del config.quantization_config
    skeleton = make_skeleton(place, config, trust_remote_code)
    if own.is_own(stored):
        tensors, scheme = restored_own(place, skeleton, stored)
    elif stored is not None:
        packed, scheme = bnb.convert_names(hf.open_folder(place), str(place))
        tensors = bnb.restored(packed, scheme, packed_shapes(skeleton), str(place))
        tensors, renamed = stacked(tensors, skeleton, str(place))
        stored_so = transposed_weights(skeleton)
        tensors = {name: _turned(t) if name in stored_so else t for name, t in tensors.items()}
    else:
        tensors, renamed = open_weights(place, skeleton)
    tensors = {
        canonical_name(name, skeleton): _finite(tensor, f"{place}: '{name}'")
        for name, tensor in tensors.items()
    }
    base = Base(place, config, skeleton, tensors, scheme, renamed)
    _check_complete(base)
    return base


def open_weights(place: Path, skeleton: PreTrainedModel) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a 16-bit folder or a .gguf file, unread, and as in `Base` those that it names otherwise.

    A folder's may lack the model's prefix.
    """
    if place.is_file():
        return gguf.open_file(place, skeleton), {}
    return stacked(hf.open_folder(place), skeleton, str(place))


def stored_as(
    path: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False
) -> tuple[bool, torch.dtype]:
    """Whether this is a 4-bit checkpoint, and the dtype in which other weights are read from it.

    Raises ModelError for what is no model.
    """
    place = locate(os.fspath(path), revision)
    config = read_config(place, place.is_file(), trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    packed = bnb.is_bnb_4bit(stored) or own.is_own(stored)
    known = None if place.is_file() else config.get_text_config().dtype
    return packed, known if isinstance(known, torch.dtype) else torch.float32


def check_readable(path: str, stored: dict[str, Any] | None) -> None:
    """Raise ModelError for weights quantized by another method than bitsandbytes 4-bit, or fourbit's own."""
    if stored is not None and not bnb.is_bnb_4bit(stored) and not own.is_own(stored):
        known = stored.get("quant_method", "unknown method")
        raise ModelError(f"{path}: already quantized ({known}); give the 16-bit model")


def weight_shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by its name, tied ones under each of theirs."""
    return {name: tuple(parameter.shape) for name, parameter in _weights(skeleton)}


def transposed_weights(skeleton: PreTrainedModel) -> set[str]:
    """Names of the weights of linear layers that are stored as [in, out], GPT-2's."""
    return {f"{name}.weight" for name, module in skeleton.named_modules() if is_transposed(module)}


def packed_shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """As `weight_shapes`, with those of linear layers as they are packed, [out, in]."""
    stored_so = transposed_weights(skeleton)
    return {
        name: shape[::-1] if name in stored_so else shape for name, shape in weight_shapes(skeleton).items()
    }


def check_fit(place: Path, skeleton: PreTrainedModel, tensors: Mapping[str, LazyTensor]) -> None:
    """Raise ModelError for a stored weight, by the skeleton's name, of another shape or of whole numbers."""
    for name, shape in weight_shapes(skeleton).items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ModelError(f"{place}: '{name}' is stored as {tensor.dtype}, which holds no weights")
        if tensor.shape is not None and tensor.shape != shape:
            raise ModelError(
                f"{place}: '{name}' has shape {list(tensor.shape)}, the config says {list(shape)}"
            )


def quantized_weights(skeleton: PreTrainedModel) -> set[str]:
    """Names of the weights that a load in 4 bits quantizes: linear layers, but head and ties, and experts.

    Raises ModelError where there is none.
    """
    skipped = FourBitQuantizer.get_modules_to_not_convert(
        skeleton, None, list(skeleton._keep_in_fp32_modules or ())
    )
    names = linear_names(skeleton, skipped)
    if not names:
        raise ModelError(
            f"{type(skeleton).__name__} has no linear layer that can be held in 4 bits; set model.quant_type "
            "to none to train it in 16 bits"
        )
    stacks = {f"{name}.{leaf}" for name in experts_names(skeleton, skipped) for leaf in STACKS}
    return {f"{name}.weight" for name in names} | stacks


def canonical_name(name: str, skeleton: PreTrainedModel) -> str:
    """A tensor's name in the model: checkpoints of the bare decoder leave its prefix out."""
    prefix = f"{skeleton.base_model_prefix}."
    if name.startswith(prefix) or not _has(skeleton, prefix + name):
        return name
    return name if _has(skeleton, name) else prefix + name


def locate(path: str, revision: str | None) -> Path:
    """The folder or .gguf file of a base, downloaded if it is a hub name. Raises ModelError."""
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").exists():
            files = sorted(local.glob("*.gguf"))
            hint = f"give the file itself: {files[0]}" if files else "a model folder has one"
            raise ModelError(f"{path}: no config.json here; {hint}")
        return local
    if local.is_file():
        if local.suffix != ".gguf":
            raise ModelError(f"{path}: give a model folder, a hub name, or a .gguf file")
        return local
    if local.suffix == ".gguf" or local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ModelError(f"{path}: no such model folder or .gguf file")
    return _download(path, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md"],
        )
    except GatedRepoError:
        raise ModelError(f"{name}: gated; accept its licence on the hub, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name}: no such folder, and no such model on the hub (private ones need `hf auth login`)"
        ) from None
    except (LocalEntryNotFoundError, OSError):
        raise ModelError(
            f"{name}: no such folder, and the hub cannot be reached; download it first, or check the name"
        ) from None
    return Path(folder)


def read_config(source: Path, is_gguf: bool, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration, from config.json or GGUF metadata. Raises ModelError."""
    if is_gguf:
        return gguf.read_config(source)
    file = source / "config.json"
    try:
        written = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); download it again") from None
    if not isinstance(written, dict):
        raise ModelError(f"{file}: not a model's configuration; download it again")
    sizes.check_numbers(file, written)
    config: PretrainedConfig = guard(
        file, lambda: AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    )
    return config


def make_skeleton(
    source: Path, config: PretrainedConfig, trust_remote_code: bool, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model on the meta device: names and shapes without memory; dtype as the config says or as given.

    Raises ModelError.
    """
    given = {} if dtype is None else {"dtype": dtype}

    def build() -> Any:
        with torch.device("meta"), sizes.modules_counted(source):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **given)

    model: PreTrainedModel = guard(source, build)
    return model


def guard(source: Path, action: Any) -> Any:
    """Run an action of transformers; what it raises becomes a ModelError that names the source."""
    try:
        return action()
    except FourBitError:
        raise
    except Exception as error:  # a strange config makes transformers raise every class there is
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise ModelError(f"{source}: cannot be loaded ({reason})") from error


def _weights(skeleton: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return list(skeleton.named_parameters(remove_duplicate=False))


def _turned(tensor: LazyTensor) -> LazyTensor:
    assert tensor.shape is not None
    return LazyTensor(lambda: tensor.read().t().contiguous(), tensor.dtype, tensor.shape[::-1])


def _finite(tensor: LazyTensor, where: str) -> LazyTensor:
    """The same tensor, whose reader raises ModelError for NaN and infinity."""
    if isinstance(tensor, LazyStack):

        def checked(number: int, matrix: torch.Tensor) -> torch.Tensor:
            check_finite(matrix, f"{where} of expert {number}")
            return matrix

        return tensor.changed(checked, tensor.dtype)

    def read() -> torch.Tensor:
        values = tensor.read()
        check_finite(values, where)
        return values

    return LazyTensor(read, tensor.dtype, tensor.shape)


def _has(skeleton: PreTrainedModel, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        return hasattr(skeleton.get_submodule(owner), leaf)
    except AttributeError:
        return False


def _check_complete(base: Base) -> None:
    check_fit(base.path, base.skeleton, base.tensors)
    for name in weight_shapes(base.skeleton):
        if name not in base.tensors and name not in base.tied:
            raise ModelError(f"{base.path}: lacks '{name}'; the checkpoint is incomplete")
