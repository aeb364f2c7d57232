"""What a merge or an export starts from: a run folder, a model, or a model and an adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fourbit.config import RunConfig
from fourbit.config_file import load_config
from fourbit.errors import ConfigError, ModelError
from fourbit.exporting.merge import Merged, Quantization, Target, merged_tensors
from fourbit.exporting.streamed import Progress, Streamed, stream_model


@dataclass(frozen=True)
class Origin:
    """What was named.

    base     a folder, hub name or .gguf file
    adapter  a PEFT folder, or None
    run      the run's settings, or None without a run
    """

    base: str
    adapter: Path | None
    run: RunConfig | None

    @property
    def sources(self) -> list[str]:
        """Places that must not be written over."""
        return [self.base, *([str(self.adapter)] if self.adapter is not None else [])]

    def merged(
        self,
        dtype: str | None,
        into: Target | None,
        original: str | os.PathLike[str] | None,
        any_base: bool,
        progress: Progress | None,
    ) -> Merged:
        """The base with the adapter in it; raises ConfigError when there is no adapter."""
        if self.adapter is None:
            raise ConfigError(
                f"{self.base}: no adapter to merge; give a run folder, or a model and an adapter"
            )
        quantization = None
        if self.run is not None:
            model = self.run.model
            quantization = Quantization(model.quant_type, model.block_size, model.double_quant)
        return merged_tensors(
            self.base,
            self.adapter,
            into=into,
            original=original,
            quantization=quantization,
            dtype=dtype,
            any_base=any_base,
            revision=self.run.model.revision if self.run else None,
            trust_remote_code=self.run is not None and self.run.model.trust_remote_code,
            progress=progress,
        )

    def streamed(
        self,
        dtype: str | None,
        into: Target | None,
        original: str | os.PathLike[str] | None,
        any_base: bool,
        progress: Progress | None,
    ) -> Streamed:
        """The model to write: merged where there is an adapter, else as it is."""
        if self.adapter is not None:
            return self.merged(dtype, into, original, any_base, progress)
        if into is not None or original is not None or any_base:
            raise ConfigError(f"{self.base}: there is no adapter, so nothing is merged into anything")
        trusted = self.run is not None and self.run.model.trust_remote_code
        return stream_model(self.base, dtype, trust_remote_code=trusted)


def find_origin(source: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None) -> Origin:
    """The base and the adapter that a run folder, or a model with `adapter`, stands for.

    A run that trained the whole model (`lora: none`) is that model. Raises ModelError for a run without
    an adapter, and for an adapter without its base.
    """
    folder = Path(source)
    if (folder / "config.yaml").exists():
        run = load_config(folder / "config.yaml")
        chosen = Path(adapter) if adapter is not None else folder / "adapter"
        if (chosen / "config.json").exists():
            return Origin(str(chosen), None, run)
        if not chosen.is_dir():
            raise ModelError(f"{folder}: the run has no adapter yet; finish it with `fourbit train --resume`")
        return Origin(run.model.path, chosen, run)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: an adapter alone; give its base, and this with --adapter")
    return Origin(os.fspath(source), Path(adapter) if adapter is not None else None, None)
