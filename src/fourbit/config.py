"""One tree of frozen, validated settings: every default of fourbit, with its source, is found here.

A run is described by a `RunConfig`, which `config_file` reads from YAML and which is saved resolved in the
run folder. Defaults follow QLoRA (arXiv:2305.14314) section 4 and appendix B where the paper gives one.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from fourbit.defaults import BLOCK_SIZES, LORA_ALPHA, LORA_DROPOUT, LORA_R, LOSS_CHUNK
from fourbit.errors import nearest

QuantType = Literal["nf4", "fp4", "int4", "none"]
#: Why a row cannot be trained.
Problem = Literal["empty", "no_trained_token", "no_end_token", "refused"]
Tracker = Literal["wandb", "mlflow", "trackio"]

#: Scores of generated answers (`fourbit.evaluate.metrics`).
METRICS = (
    "exact_match",
    "contains",
    "regex",
    "number",
    "json_valid",
    "json_match",
    "rouge_l",
    "token_f1",
)

#: QLoRA table 9: 2e-4 for 7B and 13B, 1e-4 for 33B and 65B.
LEARNING_RATE, LEARNING_RATE_LARGE, LARGE_MODEL = 2e-4, 1e-4, 32_000_000_000


def learning_rate_for(parameters: int) -> float:
    """The paper's learning rate for a model of so many parameters (QLoRA table 9)."""
    return LEARNING_RATE_LARGE if parameters >= LARGE_MODEL else LEARNING_RATE


def suggested_rank(parameters: int) -> tuple[int, int]:
    """The range of LoRA ranks worth trying first for a model of so many parameters.

    QLoRA (appendix A.1) finds quality independent of r from 8 to 256 once all linear layers carry
    an adapter, and itself trains every size with 64; small models on narrow tasks need less.
    """
    if parameters < 3_000_000_000:
        return 8, 16
    if parameters < 30_000_000_000:
        return 16, 64
    return 64, 128


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _none_word(value: Any) -> Any:
    return None if value == "none" else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelSettings(_Settings):
    """The base model and how it is held in memory."""

    path: str = Field(description="folder, hub name, or .gguf file of the base model")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    quant_type: QuantType = Field(
        default="nf4", description="nf4, fp4, int4, or none (16-bit base, for plain LoRA or full fine-tuning)"
    )
    block_size: int = Field(default=64, description="weights per scale (QLoRA section 3: 64)")
    double_quant: bool = Field(
        default=True, description="quantize the scales too (0.127 instead of 0.5 bits)"
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="dtype of matrix products; auto measures which of bfloat16 and float32 is faster",
    )
    device: str = Field(default="auto", description="cpu, cuda, or auto (cuda where there is one)")
    weight_tier: Literal["device", "host", "disk"] = Field(
        default="device",
        description="where packed weights stay: device; host, in memory beside a GPU, which holds those of "
        "two layers at a time; or disk, in the file of a 4-bit checkpoint, of which one layer at a time is "
        "in memory (CPU); changes memory and speed only",
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"block_size is {self.block_size}, must be one of {', '.join(map(str, BLOCK_SIZES))}"
            )
        return self


class LoraSettings(_Settings):
    """The adapter (Hu et al., arXiv:2106.09685; placement and rank from QLoRA section 4)."""

    r: int = Field(default=LORA_R, ge=1, description="rank; 8 to 16 for small models, 64 to 128 above 30B")
    alpha: float = Field(default=LORA_ALPHA, gt=0, description="the adapter's output is scaled by alpha / r")
    dropout: float = Field(
        default=LORA_DROPOUT, ge=0, lt=1, description="dropout on the adapter's input (QLoRA: 0.05)"
    )
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", description="all-linear, attention, or a list of layer-name endings or patterns"
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(r) instead (arXiv:2312.03732)")
    modules_to_save: Strings = Field(
        default=(), description="16-bit modules trained in full beside the adapter"
    )


class DataSettings(_Settings):
    """What is trained on, and which tokens carry loss."""

    train: Strings = Field(
        description="file or list of files (.jsonl .json .csv .tsv .parquet .txt .md, and .gz .zst .zip of "
        "them), folder of .txt and .md files, or `datasets` folder"
    )
    weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(),
        description="for each entry of train, how often its rows are used in an epoch: 2 uses each "
        "twice, 0.5 half of them, drawn by seed; empty: all once",
    )
    heldout: Strings = Field(
        default=(), description="files to evaluate on; empty splits them off the training rows"
    )
    heldout_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="share of rows split off when heldout is empty"
    )
    format: Literal["auto", "messages", "prompt_completion", "instruction", "question_answer", "text"] = (
        Field(
            default="auto",
            description="messages (also ShareGPT), prompt_completion, instruction (Alpaca), question_answer, "
            "text, or auto (by column names)",
        )
    )
    prompt: str | None = Field(
        default=None, description='template of the prompt over columns, such as "{text}"'
    )
    completion: str | None = Field(
        default=None, description='template of the answer over columns, such as "{label}"'
    )
    system: str | None = Field(default=None, description="system message put before every conversation")
    loss: Literal["completions", "last", "all"] = Field(
        default="completions",
        description="train on every answer (completions), on the last answer of a row, or on all tokens",
    )
    max_length: int = Field(
        default=1024, ge=8, description="tokens; what happens to longer rows says too_long"
    )
    too_long: Literal["drop", "split_turns", "keep_end"] = Field(
        default="drop",
        description="rows longer than max_length: drop them, split conversations at user turns, or keep "
        "their end; all are counted, and plain text is always chunked",
    )
    allow: Annotated[tuple[Problem, ...], BeforeValidator(_as_tuple)] = Field(
        default=(),
        description="kinds of rows that cannot be trained, to be dropped and counted where they would refuse "
        "the run: empty, no_trained_token, no_end_token, refused",
    )
    max_rows: int | None = Field(
        default=None, ge=1, description="use only so many training rows, drawn by seed"
    )

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {len(self.train)} entries of train; "
                "give one for each"
            )
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion templates go together: give both or neither")
        return self


class TrainSettings(_Settings):
    """The loop (QLoRA appendix B unless said otherwise)."""

    epochs: float = Field(default=1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(
        default=None, ge=1, description="stop after so many optimizer steps, whatever epochs says"
    )
    learning_rate: float | Literal["auto"] = Field(
        default="auto", description="auto: 2e-4, and 1e-4 from 33B (QLoRA table 9)"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="constant, linear or cosine, after warmup"
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="share of steps that ramp the learning rate up"
    )
    effective_batch: int = Field(default=16, ge=1, description="rows per optimizer step")
    micro_batch: int = Field(
        default=4, ge=1, description="rows computed at once; changes memory and speed, not the result"
    )
    packing: int | None = Field(
        default=None,
        ge=8,
        description="lay rows end to end, up to so many tokens at once, instead of taking micro_batch rows; "
        "they do not see each other, so the result is the same; null: micro_batch rows at once",
    )
    padding_free: bool | None = Field(
        default=None,
        description="lay the rows of a micro-batch end to end too, instead of padding them to the longest; "
        "the result is the same; null: on a CPU, with fourbit's attention and products that take any length",
    )
    max_grad_norm: float = Field(default=0.3, gt=0, description="gradient clipping (QLoRA: 0.3)")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the mean")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW: decay of the variance (QLoRA: 0.999)")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw, or adamw_8bit: its states in a quarter of the memory"
    )
    optimizer_memory: int | None = Field(
        default=None,
        ge=0,
        description="MiB of optimizer states that stay beside the weights; the rest is paged from the run's "
        "disk (on a GPU from host memory); changes memory and speed only; null: all stay",
    )
    activation_checkpointing: bool = Field(
        default=True, description="keep only layer inputs, recompute the rest"
    )
    activation_tier: Literal["device", "host", "disk"] = Field(
        default="device",
        description="where the kept inputs of layers wait for backward: device, host (pinned memory beside a "
        "GPU), or disk (a file in the run folder); changes memory and speed only",
    )
    shard_weights: bool = Field(
        default=False,
        description="under torchrun, each process holds a share of every decoder layer's weights and gathers "
        "a layer when it computes it; changes memory and speed only",
    )
    fused: bool = Field(
        default=True,
        description="on a CPU, compute with fourbit's attention, norms, gated MLPs and rotary "
        "embeddings; false: transformers'",
    )
    loss_chunk: int = Field(
        default=LOSS_CHUNK,
        ge=1,
        description="MiB of logits formed at once in the loss; changes memory and speed only",
    )
    group_by_length: bool = Field(default=True, description="batches of similar length, less padding (QLoRA)")
    eval_every: int = Field(
        default=100, ge=1, description="optimizer steps between evaluations and checkpoints"
    )
    early_stop_patience: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations without a better held-out loss"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="how many of the newest checkpoints stay")
    deterministic: bool = Field(
        default=True,
        description="the same run gives the same bytes; false lets a GPU take faster kernels that race",
    )
    seed: int = Field(default=0, ge=0, description="seed of split, order, adapter initialisation and dropout")
    tensorboard: bool = Field(default=False, description="also write TensorBoard events into the run folder")
    trackers: Annotated[tuple[Tracker, ...], BeforeValidator(_as_tuple)] = Field(
        default=(),
        description="also send curves and settings, never rows, to wandb, mlflow or trackio; where these "
        "keep them is up to their own settings (WANDB_MODE=offline, MLFLOW_TRACKING_URI)",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, given: Any) -> Any:
        # Run folders of earlier versions name it in their config.yaml; it changed memory only.
        return {k: v for k, v in given.items() if k != "compact_heap"} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.packing is not None and self.padding_free is False:
            raise ValueError("packing lays rows end to end: padding_free cannot be false beside it")
        return self

    @property
    def end_to_end(self) -> bool:
        """Whether rows computed at once are laid end to end; null of padding_free counts as no."""
        return self.packing is not None or bool(self.padding_free)


class EvalSettings(_Settings):
    """Generation while evaluating, and how its answers are scored."""

    max_new_tokens: int = Field(default=64, ge=1, description="longest answer generated")
    batch_size: int = Field(default=32, ge=1, description="prompts generated at once")
    metrics: Strings = Field(default=("exact_match",), description=f"scores of answers: {', '.join(METRICS)}")
    pattern: str | None = Field(
        default=None, description="what regex looks for; a group extracts what must equal the reference's"
    )
    shots: int = Field(default=0, ge=0, description="multiple choice: worked examples before each question")
    shots_file: str | None = Field(
        default=None, description="multiple choice: file of the examples, the first ones of each subject"
    )
    choice_prompt: Literal["plain", "chat"] = Field(
        default="plain",
        description="multiple choice and lm-eval: plain text as MMLU has it, or a turn of a chat",
    )

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = next((name for name in names if name not in METRICS), None)
        if unknown is not None:
            hint = nearest(unknown, METRICS) or f"; known are {', '.join(METRICS)}"
            raise ValueError(f"unknown metric '{unknown}'{hint}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"name at least one metric, and each once, not [{', '.join(names)}]")
        return names

    @model_validator(mode="after")
    def _check(self) -> EvalSettings:
        if ("regex" in self.metrics) != (self.pattern is not None):
            raise ValueError("pattern and the metric regex go together: give both or neither")
        if (self.shots > 0) != (self.shots_file is not None):
            raise ValueError("shots and shots_file go together: give both or neither")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None
        return self


class RunConfig(_Settings):
    """Everything that determines a run."""

    model: ModelSettings
    lora: Annotated[LoraSettings | None, BeforeValidator(_none_word)] = Field(
        default=LoraSettings(),
        description="the adapter, or none for full fine-tuning (needs quant_type none)",
    )
    data: DataSettings
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    output: str = Field(default="runs/latest", description="the run folder")

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.lora is None and self.model.quant_type != "none":
            raise ValueError(
                "lora: none trains the base itself, which 4-bit weights cannot: set model.quant_type to none"
            )
        if self.train.activation_tier != "device" and not self.train.activation_checkpointing:
            raise ValueError(
                f"train.activation_tier: {self.train.activation_tier} is about what activation checkpointing "
                "keeps and needs train.activation_checkpointing"
            )
        if self.model.weight_tier != "device" and not self.train.activation_checkpointing:
            raise ValueError(
                f"model.weight_tier: {self.model.weight_tier} holds a layer or two at a time and needs "
                "train.activation_checkpointing"
            )
        return self
