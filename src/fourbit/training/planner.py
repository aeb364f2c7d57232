"""From the settings of a run to its plan.

Weights are counted on the model's skeleton, a step's memory is rehearsed on tensors without storage
(`rehearse`), the runtime is measured (`runtime`). Nothing of the weights is read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel

from fourbit.config import RunConfig
from fourbit.data.pack import packed_size
from fourbit.evaluate.heldout import TOKENS_PER_BATCH
from fourbit.kernels import native
from fourbit.memory.activations import IN_MEMORY
from fourbit.memory.choose import Head, alternatives, choose
from fourbit.memory.plan import Choice, Part, Phase, Plan
from fourbit.memory.weights import Weights, count_weights, loading_bytes
from fourbit.model.base import stored_as
from fourbit.ops.linear import multiplies_panels
from fourbit.optim.adamw import state_bytes
from fourbit.processes import join
from fourbit.shapes import rounded_size
from fourbit.training.layout import takes_any_length
from fourbit.training.rehearse import Rehearsal
from fourbit.training.runtime import CUDA_CONTEXT, runtime_bytes
from fourbit.training.skeleton import run_skeleton
from fourbit.training.target import Rows, Target
from fourbit.training.trackers import libraries_of

#: Code that oneDNN generates and keeps for each shape of a bf16 product on a CPU (docs/log.md).
_CODE_PER_PRODUCT = 670_000
#: Products of different shapes that one kind of linear layer brings, its adapter's and backward's included.
_PRODUCTS_PER_LINEAR = 4
#: What a thread packs of a product's input, at most (csrc/product.cpp).
_TILES = 4 << 20
#: What a tokenizer takes for each word.
_BYTES_PER_WORD = 400
#: How much more runs have taken than predicted, as a share of the peak.
_MORE = 0.05
#: What an encoded row takes, wherever its tokens are: its place among them, and numbers that order rows.
_BYTES_PER_ROW = 200
#: What cuBLAS keeps on a card (CUBLAS_WORKSPACE_CONFIG :4096:8, set for repeatable runs).
_CUBLAS = 8 * 4096 * 1024


class Planner:
    """Plans of one run under different choices; what they share is found once."""

    def __init__(self, config: RunConfig, target: Target, rows: Rows, runtime: int | None = None) -> None:
        self._config, self._target, self._rows = config, target, rows
        self._runtime = runtime
        skeleton = run_skeleton(config, target.dtype)
        self.weights: Weights = count_weights(skeleton)
        base: Any = skeleton.get_base_model() if isinstance(skeleton, PeftModel) else skeleton
        self._kinds = len(
            {
                (module.in_features, module.out_features)
                for name, module in base.named_modules()
                if isinstance(module, torch.nn.Linear) and ".lora_" not in name
            }
        )
        self._panels = (
            target.on_cpu
            and self.weights.codes > 0
            and multiplies_panels(torch.empty(1, 1, dtype=target.dtype), self.weights.codes)
        )
        text = base.config.get_text_config()
        self._vocabulary, self._tied = int(text.vocab_size), bool(text.tie_word_embeddings)
        self._head_weights = self._vocabulary * int(text.hidden_size)
        source = config.model
        packed, dtype = stored_as(source.path, source.revision, source.trust_remote_code)
        self._can_map = target.on_cpu and packed
        self._copies = loading_bytes(base, dtype, packed)
        fused = config.train.fused and target.on_cpu and native.available()
        ours = fused and base.config._attn_implementation == "sdpa"
        free = config.train.padding_free
        any_length = ours and takes_any_length(target.dtype, self.weights.codes)
        self._end_to_end = any_length if free is None else free
        self._rehearsal = Rehearsal(skeleton, fused, target.on_cpu and native.available())

    def use_rows(self, rows: Rows, end_to_end: bool) -> None:
        """Plan for these rows from now on, laid so in micro-batches."""
        self._rows, self._end_to_end = rows, end_to_end

    @property
    def asked(self) -> Choice:
        """What the settings say as they are."""
        train = self._config.train
        return Choice(
            train.micro_batch,
            train.activation_checkpointing,
            train.loss_chunk,
            train.optimizer_memory,
            self._config.model.weight_tier,
            train.activation_tier,
        )

    @property
    def tiers(self) -> tuple[str, ...]:
        """Where the packed weights may be."""
        asked = self._config.model.weight_tier
        if asked != "device" or not self.weights.codes or self._shares > 1:
            return (asked,)
        if not self._target.on_cpu:
            return ("device", "host")
        return ("device", "disk") if self._can_map else (asked,)

    @property
    def activation_tiers(self) -> tuple[str, ...]:
        """Where the inputs of checkpointed layers may wait."""
        asked = self._config.train.activation_tier
        return ("device", "disk" if self._target.on_cpu else "host") if asked == "device" else (asked,)

    def choose(self, budget: int) -> Plan:
        """The fastest plan within a budget in bytes. Raises MemoryBudgetError."""
        return choose(self.plan, self.choices(), budget)

    def choices(self) -> list[Choice]:
        """All that may be chosen for this run, those expected to be faster first."""
        train = self._config.train
        found = alternatives(
            train.effective_batch,
            train.loss_chunk,
            self._padded(1)[1],
            train.optimizer_memory,
            self.tiers,
            self.activation_tiers,
            self._head,
        )
        weights, bits = self.weights.trained // 4, self._bits
        if state_bytes(weights, bits, 0)[0] >= state_bytes(weights, bits, None)[0]:  # too few to gain
            found = [choice for choice in found if choice.optimizer_memory == train.optimizer_memory]
        if train.packing is not None:  # packs are computed one at a time
            found = [choice for choice in found if choice.micro_batch == 1]
        return found

    @property
    def _head(self) -> Head:
        looked_up = 0 if self._tied else self._head_weights  # the embedding, of the same size
        share = self._head_weights / (self.weights.parameters - looked_up)
        return Head(share, self._vocabulary, self._rows.trained)

    def plan(self, choice: Choice) -> Plan:
        """What the run takes under a choice."""
        weights = self.weights
        plan = Plan(
            model=self._config.model.path,
            device=self._target.name,
            parameters=weights.parameters,
            trainable=weights.trainable,
            tokens=self._padded(1)[1],
            effective_batch=self._config.train.effective_batch,
            choice=choice,
            held=self._held(choice),
            phases=(self._loading(choice), self._step(choice), self._evaluation(choice)),
            budget=self._target.memory,
        )
        return replace(plan, uncertain=self._uncertain(plan))

    def _uncertain(self, plan: Plan) -> int:
        return round(_MORE * plan.peak) if self._target.on_cpu else 0

    @property
    def loaded_bytes(self) -> int:
        """What the run takes all the time, whatever is chosen, and what loading takes beside it."""
        return sum(part.size for part in (*self._held(self.asked), *self._loading(self.asked).parts))

    def _held(self, choice: Choice) -> tuple[Part, ...]:
        weights, target = self.weights, self._target
        dtype = str(target.dtype).removeprefix("torch.")
        adapter = self._config.lora is not None
        parts = [
            *self._packed(choice),
            Part(f"weights in {dtype}", weights.rest, "embeddings, head, norms"),
            Part("adapters" if adapter else "trained weights", weights.trained, "fp32"),
            Part("gradients", weights.trained, "fp32"),
            self._optimizer(choice),
            self._product_scratch(choice),
        ]
        if target.on_cpu:
            parts.insert(0, Part("runtime", self._runtime_bytes, "Python and libraries"))
            words = self._rows.words or self._vocabulary
            parts.append(Part("tokenizer", words * _BYTES_PER_WORD, f"{words:,} words"))
            rows = self._rows.count or 0
            parts.append(Part("rows", rows * _BYTES_PER_ROW, f"{rows:,}, their tokens in a file"))
            parts.append(Part("generated code", self._code(), "oneDNN's, by shape of product"))
        else:
            parts.insert(0, Part("runtime", CUDA_CONTEXT, "CUDA context and kernels, about"))
            parts.append(Part("cuBLAS workspace", _CUBLAS))
        return tuple(part for part in parts if part.size)

    def _packed(self, choice: Choice) -> list[Part]:
        weights = self.weights
        if self._shares > 1:
            detail = f"{self._config.model.quant_type}, 1/{self._shares} of them and two layers"
            return [Part("packed weights", self._shared, detail)]
        if choice.weight_tier == "device":
            return [
                Part("packed weights", weights.codes, self._config.model.quant_type),
                Part("scales", weights.scales),
            ]
        every, depth = weights.codes + weights.scales, self._rehearsal.depth
        if choice.weight_tier == "disk":
            layers, text, where = 1, "one layer", "on the disk"
        else:
            layers, text, where = 2, "two layers", "in host memory"
        detail = f"{text} of {depth}; {every / 1e6:,.0f} MB {where}"
        return [Part("packed weights", -(-layers * every // depth), detail, tier=choice.weight_tier)]

    @property
    def _shares(self) -> int:
        return join().size if self._config.train.shard_weights else 1

    @property
    def _shared(self) -> int:
        """This process's share, and two layers gathered: one computes, the next arrives."""
        every = self.weights.codes + self.weights.scales
        return -(-every // self._shares) + 2 * -(-every // self._rehearsal.depth)

    @property
    def _bits(self) -> int:
        return 8 if self._config.train.optimizer == "adamw_8bit" else 32

    def _optimizer(self, choice: Choice) -> Part:
        bits = self._bits
        memory = None if choice.optimizer_memory is None else choice.optimizer_memory << 20
        here, elsewhere = state_bytes(self.weights.trained // 4, bits, memory)
        tier = "disk" if self._target.on_cpu else "host memory"
        paged = f", {elsewhere / 1e6:,.0f} MB more on {tier}" if elsewhere else ""
        return Part("optimizer states", here, f"AdamW, {bits} bits{paged}")

    def _product_scratch(self, choice: Choice) -> Part:
        weights, size = self.weights, self._target.dtype.itemsize
        if not self._panels:
            dtype = str(self._target.dtype).removeprefix("torch.")
            return Part("dequantize buffer", weights.largest * size, f"largest matrix, {dtype}")
        rows, tokens = self._padded(choice.micro_batch)
        tiles = min(_TILES, rows * tokens * weights.widest * size) * torch.get_num_threads()
        return Part("product scratch", tiles + weights.largest // self._config.model.block_size * 4)

    @cached_property
    def _runtime_bytes(self) -> int:
        libraries = libraries_of(self._config.train)
        return runtime_bytes(self._target.dtype, libraries) if self._runtime is None else self._runtime

    def _code(self) -> int:
        if self._target.dtype != torch.bfloat16:
            return 0
        kinds = 1 if self._panels else self._kinds  # the head, which is not packed
        return self._rows.shapes * kinds * _PRODUCTS_PER_LINEAR * _CODE_PER_PRODUCT

    def _padded(self, micro_batch: int) -> tuple[int, int]:
        """Rows and tokens of the largest micro-batch."""
        train, longest = self._config.train, self._rows.longest
        if train.packing is not None:
            return 1, packed_size([max(train.packing, longest)])
        rows = min(micro_batch, train.effective_batch, self._rows.count or micro_batch)
        return (1, packed_size([longest] * rows)) if self._end_to_end else (rows, rounded_size(longest))

    def _step(self, choice: Choice) -> Phase:
        rows, tokens = self._padded(choice.micro_batch)
        recompute = choice.activation_checkpointing
        trained = max(1, min(rows * (tokens - 1), round(rows * tokens * self._rows.trained)))
        needs = self._rehearsal.layers(rows, tokens, recompute)
        loss = self._loss(rows, tokens, trained, choice.loss_chunk)
        here = ("device", "host") if self._target.on_cpu else ("device",)
        beyond = 0 if choice.activation_tier in here else max(0, self._rehearsal.depth - IN_MEMORY)
        elsewhere = beyond * needs.layer
        where = f", {elsewhere / 1e6:,.0f} MB more on {choice.activation_tier}" if elsewhere else ""
        name, made_of = (
            ("checkpoints", "inputs of layers") if recompute else ("activations", "read by backward")
        )
        kept = Part(name, needs.kept - elsewhere, f"{made_of}, {rows} x {tokens:,} tokens{where}")
        layer = needs.highest - needs.kept
        if needs.free + loss > layer:
            free = f", {needs.free / 1e6:,.0f} MB that kernels hold free" if needs.free else ""
            top = Part("loss chunk", needs.free + loss, f"{choice.loss_chunk} MiB of logits, gradients{free}")
        else:
            top = Part("one layer", layer, "forward and backward, attention")
        return Phase("a training step", (kept, top))

    def _loss(self, rows: int, tokens: int, trained: int, chunk: int, gradient: bool = True) -> int:
        seen = self._rehearsal.loss(rows, tokens, trained, chunk, gradient)
        # Out of sight, what products hold: about half as much as the logits (docs/log.md).
        held = min(chunk * 2**20 // 4, trained * self._vocabulary) * self._target.dtype.itemsize // 2
        return seen + (held if self._target.on_cpu else 0)

    def _evaluation(self, choice: Choice) -> Phase:
        count, longest = self._rows.heldout or (TOKENS_PER_BATCH, self._rows.longest)
        if count == 0:
            return Phase("evaluation", ())
        rows, tokens = min(count, max(1, TOKENS_PER_BATCH // longest)), rounded_size(longest)
        needs = self._rehearsal.forward(rows, tokens)
        loss = (
            needs.kept
            + needs.free
            + self._loss(rows, tokens, rows * (tokens - 1), choice.loss_chunk, gradient=False)
        )
        size = max(needs.highest, loss)
        forward = Part("forward pass", size, f"{rows} x {tokens:,} tokens")
        return Phase("evaluation", (forward,), absent=self.weights.trained)  # gradients, freed with the step

    def _loading(self, choice: Choice) -> Phase:
        later = sum(part.size for part in self._held(choice) if part.name in _AFTER_LOADING)
        parts = [Part("a weight", self._copies, "as it is read")]
        if self._shares > 1 and self._target.on_cpu:
            whole = self.weights.codes + self.weights.scales - self._shared
            parts.append(Part("other shares", whole, "until all is loaded"))
        return Phase("loading", tuple(parts), absent=later)


_AFTER_LOADING = (
    "adapters", "gradients", "optimizer states", "dequantize buffer", "product scratch", "rows",
    "generated code",
)  # fmt: skip


def plan_run(
    config: RunConfig, memory: int | None = None, device: str | None = None, rows: Rows | None = None
) -> Plan:
    """The plan of a run: as its settings say, or the fastest within `memory` bytes.

    device  cpu, cuda, or a card's name such as "rtx-4090", which need not be here; None: as set
    rows    figures of the encoded rows; None: rows of data.max_length tokens, all of them trained
    Raises MemoryBudgetError where nothing fits, and ConfigError or ModelError as a run would.
    """
    planner = Planner(config, Target.of(config, device), rows or Rows(config.data.max_length))
    return planner.plan(planner.asked) if memory is None else planner.choose(memory)
