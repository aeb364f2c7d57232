"""What `merge` and `export` do beside writing: choose the better weights, and read the result back."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fourbit.cli.common import stage_progress
from fourbit.cli.verify import add_verify_arguments, bounds, print_verification
from fourbit.config import RunConfig
from fourbit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from fourbit.exporting.merge import Target
    from fourbit.exporting.verification import Verification

#: How each kind of export is read back, as `exporting.readers` names it.
_FORMATS = {
    "hf": "16-bit",
    "bnb": "bitsandbytes",
    "gguf": "gguf",
    "lora-gguf": "lora gguf",
    "gptq": "compressed-tensors",
    "awq": "compressed-tensors",
}


@dataclass(frozen=True)
class Reference:
    """What a result is compared with: the run's model as it was trained."""

    config: RunConfig
    adapter: Path | None


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """--no-verify and what `fourbit verify` takes."""
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back")
    parser.add_argument("--gguf-base", metavar="FILE", help="the base as .gguf, to read a LoRA .gguf on")
    add_verify_arguments(parser)


def find_reference(args: argparse.Namespace, kind: str, out: Console) -> Reference | None:
    """What the result will be compared with, found before anything is written; None if it will not be.

    Raises ModelError when the reader of this kind is not installed.
    """
    if args.no_verify:
        return None
    bounds(args)
    if args.rows < 1:
        raise ConfigError(f"--rows {args.rows}: give at least 1")
    from fourbit.exporting.origin import find_origin
    from fourbit.exporting.readers import require

    origin = find_origin(args.source, args.adapter)
    reason = None
    if origin.run is None:
        reason = "only a run has held-out rows and says how its base was held"
    elif kind == "lora-gguf" and args.gguf_base is None and Path(origin.base).suffix != ".gguf":
        reason = "a LoRA file is read on its base as .gguf; give one with --gguf-base"
    if origin.run is None or reason is not None:
        out.print(f"the result will not be verified: {reason}", highlight=False, soft_wrap=True, markup=False)
        return None
    try:
        require(_FORMATS[kind], Path(args.output))
    except ModelError as error:
        raise ModelError(f"{error}; or write it unread with --no-verify") from None
    model = origin.run.model.model_copy(update={"path": origin.base})
    return Reference(origin.run.model_copy(update={"model": model}), origin.adapter)


def choose_target(args: argparse.Namespace, reference: Reference | None, out: Console) -> Target | None:
    """--into, or the better of two where nothing was asked for and both are at hand.

    The adapter on the original weights, read by PEFT, has the loss that merging into them would have;
    merging into the dequantized ones has the adapter's own.
    """
    if args.into is not None or args.original is not None or reference is None or reference.adapter is None:
        into: Target | None = args.into
        return into
    from fourbit.model.base import open_base

    settings = reference.config.model
    if settings.quant_type == "none" or open_base(settings.path).scheme is not None:
        return None
    found = _measure(args, reference, reference.adapter, "choose", out)
    trained, original = found.reference.loss, found.checked[0].measured.loss
    target: Target = "original" if original <= trained else "dequantized"
    out.print(
        f"merging into the {target} weights: held-out loss on the original ones {original:.4f}, "
        f"on the {settings.quant_type} ones that were trained on {trained:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    return target


def check_result(
    args: argparse.Namespace, reference: Reference | None, place: Path, out: Console
) -> dict[str, Any] | None:
    """Read the result back, print the table, put the figures into its record; returns them.

    Raises VerificationError when it lost more than allowed. What was written stays, with its figures.
    """
    if reference is None:
        return None
    from fourbit.exporting import provenance

    found = _measure(args, reference, place, "verify", out)
    print_verification(found, out)
    *before, last = provenance.read(place)
    one = found.checked[0]
    effect = {
        "heldout_loss": one.measured.loss,
        "heldout_loss_before": found.reference.loss,
        "top1_agreement": one.agreement,
    }
    provenance.write(place, [*before, replace(last, effect={**last.effect, **effect})])
    found.check(args.accept_loss)
    return found.to_dict()


def _measure(
    args: argparse.Namespace, reference: Reference, place: Path, name: str, out: Console
) -> Verification:
    from fourbit.exporting.verify import verify

    with stage_progress(name, out) as progress:
        return verify(
            reference.config,
            reference.adapter,
            [place],
            files=args.data,
            rows=args.rows,
            bounds=bounds(args),
            gguf_base=args.gguf_base,
            progress=progress,
        )
