"""The model that a command works on: a run folder's, or one named by --model and --adapter."""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.cli.common import run_settings
from fourbit.config import ModelSettings, RunConfig
from fourbit.config_file import load_config
from fourbit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """A loaded model. Its adapter, if it has one, can be switched off for a while."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    has_adapter: bool

    def base(self) -> AbstractContextManager[Any]:
        """The model is the base inside this context."""
        if not self.has_adapter:
            return nullcontext()
        return self.model.disable_adapter()  # type: ignore[operator]


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, --model, --adapter, --set."""
    parser.add_argument(
        "run_folder", nargs="?", metavar="RUN", help="run folder of `fourbit train`, or its config file"
    )
    parser.add_argument("--model", help="instead of RUN: a folder, a hub name or a .gguf file")
    parser.add_argument("--adapter", help="PEFT adapter folder (default: the run's)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one setting, such as model.quant_type=none",
    )


def read_subject_settings(args: argparse.Namespace, data: str | None = None) -> RunConfig:
    """The settings of the run, or of --model, with --set applied; `data` stands for data.train without a run.

    Raises ConfigError.
    """
    if (args.run_folder is None) == (args.model is None):
        raise ConfigError("give a run folder, or --model and perhaps --adapter")
    if args.run_folder is not None:
        if Path(args.run_folder).is_file():  # the config that was trained; its run lies where it says
            args.run_folder = load_config(args.run_folder).output
        run_settings(args.run_folder)
        return load_config(Path(args.run_folder) / "config.yaml", args.overrides)
    shortcuts = [f"model.path={json.dumps(args.model)}", f"data.train={json.dumps(data or 'none')}"]
    return load_config(None, [*shortcuts, *args.overrides])


def open_subject(args: argparse.Namespace, settings: ModelSettings) -> Subject:
    """Load the base and put the adapter on it. Raises ModelError in one line."""
    from fourbit.model.adapters import load_adapter
    from fourbit.model.load import load

    adapter = args.adapter
    if adapter is None and args.run_folder is not None:
        adapter = str(Path(args.run_folder) / "adapter")
        if not Path(adapter).is_dir():
            raise ModelError(
                f"{args.run_folder}: the run has no adapter yet; finish it with "
                f"`fourbit train {args.run_folder}/config.yaml --resume`"
            )
    model, tokenizer = load(settings.path, **settings.model_dump(exclude={"path"}))
    if adapter is None:
        return Subject(model, tokenizer, has_adapter=False)
    return Subject(load_adapter(model, adapter), tokenizer, has_adapter=True)
