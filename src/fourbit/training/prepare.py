"""What a run trains, ready: the base with its adapter, and the encoded rows."""

from __future__ import annotations

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourbit.config import RunConfig
from fourbit.data.encode import Encoded
from fourbit.data.examples import Examples
from fourbit.data.gate import prepare
from fourbit.data.read import iter_rows
from fourbit.data.view import report_table
from fourbit.model.adapters import add_lora, parameter_counts
from fourbit.model.compute import choose_compute_dtype, choose_device
from fourbit.model.load import load, load_report
from fourbit.processes import join


def check_data(config: RunConfig) -> None:
    """Before the model is loaded, so that a mistake in a file's last line costs seconds and not minutes.

    The rows are read again when they are needed, not kept beside the model.
    """
    for _ in iter_rows([*config.data.train, *config.data.heldout], config.data):
        pass


def prepare_model(
    config: RunConfig, console: Console
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The base as configured, with a fresh adapter, or all of it trainable under `lora: none`."""
    settings = config.model
    full = config.lora is None
    dtype, device = str(settings.compute_dtype), settings.device
    if config.train.shard_weights and join().size > 1:  # whole in host memory, each share where it belongs
        dtype = str(choose_compute_dtype(dtype, choose_device(device)).dtype).removeprefix("torch.")
        device = "cpu"
    base, tokenizer = load(
        settings.path,
        quant_type=settings.quant_type,
        double_quant=settings.double_quant,
        block_size=settings.block_size,
        # Full fine-tuning keeps fp32 master weights and computes under autocast.
        compute_dtype="float32" if full else dtype,
        device=device,
        weight_tier=settings.weight_tier,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    report = load_report(base)
    console.print(report.line(), highlight=False, soft_wrap=True)
    console.print(
        f"compute dtype {str(report.rest_dtype).removeprefix('torch.')}: {report.compute_reason}",
        highlight=False,
        soft_wrap=True,
    )
    model: PreTrainedModel | PeftModel = base
    if config.lora is None:
        base.requires_grad_(True)
    else:
        model = add_lora(base, **config.lora.model_dump(), seed=config.train.seed)
    trainable, total = parameter_counts(model)
    console.print(
        f"trainable: {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)", highlight=False
    )
    return model, tokenizer


def prepare_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[Encoded, Examples, Examples]:
    """(what was read, training examples, held-out examples); raises DataError with none to train on."""
    with console.status("reading data") as status:
        prepared = prepare(
            config.data,
            tokenizer,
            config.train.seed,
            lambda _, done, total: status.update(f"reading data: {done:,} rows"),
        )
    console.print(report_table(prepared.report.lines()))
    if prepared.encoded.origin:
        console.print(prepared.encoded.origin)
    return prepared.encoded, prepared.train, prepared.heldout
