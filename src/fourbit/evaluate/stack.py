"""One token for each row through all decoder layers in one native call, where a model has Llama's structure.

A model matches by its modules, not by its name: decoder layers of two RMS norms, attention with rotary
embedding and grouped heads, a gated MLP, every product a packed weight with at most one plain adapter. What
cannot be seen in modules, such as factors on residuals, shows in numbers: the first token is computed both
ways, and a model for which they differ keeps its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import ModelError
from fourbit.evaluate.cache import RoomyLayer
from fourbit.kernels.decode import Decoder, Layer, Linear, Shape
from fourbit.kernels.product import Adapter, few_rows
from fourbit.nn.decoder import layer_list
from fourbit.nn.fused import gated_kind
from fourbit.nn.linear import Linear4bit
from fourbit.nn.lora import LoraLinear
from fourbit.nn.loss import split_model
from fourbit.nn.norm import norm_added, norm_eps
from fourbit.nn.replaced import runs_own_code
from fourbit.ops.library import runs_native
from fourbit.ops.linear import multiplies_panels

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
#: How far a layer's result may lie from that of its own code, as a share of what the layer adds.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


class Unfit(Exception):
    """Why a model is not decoded in one call."""


class Stack:
    """The decoder of a model with the adapter that is active now. Raises Unfit."""

    def __init__(self, model: nn.Module) -> None:
        decoder: Any = split_model(model)[0]
        self._decoder = decoder
        config: Any = self._decoder.config
        depth = int(config.num_hidden_layers)
        owner, name = layer_list(decoder, depth)
        modules: list[Any] = list(getattr(owner, name))
        if (
            owner is not decoder
            or _children(decoder) != _DECODER
            or getattr(config, "attn_logit_softcapping", None)
        ):
            raise Unfit("its decoder is more than embeddings, layers and a norm")
        if not all(runs_own_code(part) for layer in modules for part in layer.modules()):
            raise Unfit("hooks watch its layers, or their code was replaced")  # such as weights on the disk
        weight: Tensor = self._decoder.norm.weight
        self.dtype = weight.dtype
        if not runs_native(weight):
            raise Unfit("native code does not run here")
        attention = modules[0].self_attn
        width = int(attention.head_dim)
        self._eps: set[float | None] = set()
        self._seen: dict[tuple[Callable[..., Any], type], Any] = {}
        layers = [self._layer(module, config, number) for number, module in enumerate(modules)]
        if len(self._eps) > 1:
            raise Unfit("its norms have several eps")
        weights = sum(
            weight.weight.out_features * weight.weight.in_features for weight in (layers[0].q, layers[0].up)
        )
        few = few_rows(self.dtype)
        self.most_rows = 1 << 30 if multiplies_panels(torch.empty(1, 1, dtype=self.dtype), weights) else few
        eps = self._eps.pop()
        assert eps is not None
        self._native = Decoder(
            Shape(
                hidden_size=layers[0].q.weight.in_features,
                feed_forward=layers[0].gate.weight.out_features,
                heads=layers[0].q.weight.out_features // width,
                kv_heads=layers[0].k.weight.out_features // width,
                width=width,
                eps=eps,
                scale=float(attention.scaling),
                activation=self._once(gated_kind, modules[0].mlp),
                few_rows=few,
                dtype=self.dtype,
            ),
            layers,
        )

    def step(self, ids: Tensor, known: Tensor, cache: Any) -> Tensor:
        """Hidden states [B, 1, H] after ids [B, 1], appended to the cache; known: `Context`'s [B, S + 1]."""
        hidden: Tensor = self._decoder.embed_tokens(ids).to(self.dtype)[:, 0].contiguous()
        layers: list[RoomyLayer] = cache.layers
        self._native.step(hidden, known, *self._angles(hidden, known), [layer.claim() for layer in layers])
        out: Tensor = self._decoder.norm(hidden[:, None])
        return out

    def agrees(self, own: Sequence[Tensor], known: Tensor, cache: Any) -> bool:
        """Whether each layer does what the model's own code did; the cache stays as that left it.

        own  hidden states [B, 1, H] before the first layer and after each
        """
        layers: list[Any] = cache.layers
        if len(own) != len(layers) + 1:
            return False
        last = [(layer.keys[:, :, -1].clone(), layer.values[:, :, -1].clone()) for layer in layers]
        for layer in layers:
            layer.truncate(known.shape[1] - 1)
        rooms = [layer.claim() for layer in layers]
        angles = self._angles(own[0][:, 0], known)
        agrees = True
        for number in range(len(layers)):
            before, after = own[number][:, 0], own[number + 1][:, 0]
            found = before.clone().contiguous()
            self._native.step(found, known, *angles, rooms, only=number)
            # Of what the layer adds: residuals of a few large values would hide it.
            change = (after.float() - before.float()).norm()
            distance = (found.float() - after.float()).norm() / change
            agrees = agrees and bool(distance <= _TOLERANCE[self.dtype])  # not so where it is no number
        for layer, (key, value) in zip(layers, last, strict=True):
            layer.keys[:, :, -1], layer.values[:, :, -1] = key, value
        return agrees

    def _angles(self, hidden: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [B, width], of the last positions."""
        cos, sin = self._decoder.rotary_emb(hidden[:, None], known[:, -1:])
        return cos[:, 0].float().contiguous(), sin[:, 0].float().contiguous()

    def _layer(self, module: Any, config: Any, number: int) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        slides = window if kinds is None or kinds[number] == "sliding_attention" else None
        parts = _children(attention)
        fits = (
            _children(module) == _LAYER
            and parts - _HEAD_NORMS == _ATTENTION
            and parts & _HEAD_NORMS in (set(), _HEAD_NORMS)
            and not list(attention.parameters(recurse=False))
            and self._once(gated_kind, mlp) is not None
        )
        if not fits:
            raise Unfit(f"{type(module).__name__} is not two norms, attention and a gated MLP")
        head_norms = [self._norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if name in parts]
        q_norm, k_norm = head_norms or (None, None)
        return Layer(
            q=self._linear(attention.q_proj),
            k=self._linear(attention.k_proj),
            v=self._linear(attention.v_proj),
            o=self._linear(attention.o_proj),
            gate=self._linear(mlp.gate_proj),
            up=self._linear(mlp.up_proj),
            down=self._linear(mlp.down_proj),
            input_norm=self._norm(module.input_layernorm),
            output_norm=self._norm(module.post_attention_layernorm),
            q_norm=q_norm,
            k_norm=k_norm,
            window=int(slides or 0),
        )

    def _norm(self, module: nn.Module) -> Tensor:
        added = self._once(norm_added, module)
        if added is None:
            raise Unfit(f"{type(module).__name__} is not an RMS norm")
        self._eps.add(norm_eps(module))
        weight: Any = module.weight
        return (weight.detach().float() + added).contiguous()

    def _once(self, ask: Callable[[nn.Module], Any], module: nn.Module) -> Any:
        """What a question says of a module, asked once for each class."""
        key = (ask, type(module))
        if key not in self._seen:
            self._seen[key] = ask(module)
        return self._seen[key]

    def _linear(self, module: nn.Module) -> Linear:
        adapter: Adapter | None = None
        base = module
        if isinstance(module, LoraLinear):
            base = module.get_base_layer()
            adapter = module.plain_adapter()
            if (
                adapter is None
                and not module.disable_adapters
                and set(module.active_adapters) & set(module.lora_A)
            ):
                raise Unfit("an adapter is not plain LoRA")
        if type(base) is not Linear4bit or base.compute_dtype not in (None, self.dtype):
            raise Unfit(f"{type(base).__name__} is not packed, or computes in another dtype")
        bias = None if base.bias is None else base.bias.detach().to(self.dtype).contiguous()
        return Linear(base.packed(), bias, adapter)


class Decoding:
    """The stack of a model, found with the first token; for as long as neither it nor its adapter changes."""

    def __init__(self) -> None:
        self._stack: Stack | None = None
        self._tried = False

    def step(self, ids: Tensor, known: Tensor, cache: Any) -> Tensor | None:
        """As `Stack.step`, or None where the model must run its own code."""
        if self._stack is None or len(ids) > self._stack.most_rows:
            return None
        return self._stack.step(ids, known, cache)

    @contextmanager
    def learning(self, model: nn.Module, known: Tensor, cache: Any) -> Iterator[None]:
        """A block in which the model's own code takes a token; finds out whether the next ones need it."""
        if self._tried:
            yield
            return
        self._tried = True
        with _layer_states(split_model(model)[0]) as own:
            yield
        self._stack = agreeing_stack(model, own, known, cache)


@contextmanager
def _layer_states(decoder: Any) -> Iterator[list[Tensor]]:
    """A list that takes the hidden states before the first layer and after each, within a block."""
    states: list[Tensor] = []
    try:
        owner, name = layer_list(decoder, int(decoder.config.num_hidden_layers))
    except (ModelError, AttributeError):
        yield states
        return
    layers: list[nn.Module] = list(getattr(owner, name))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def agreeing_stack(model: nn.Module, own: Sequence[Tensor], known: Tensor, cache: Any) -> Stack | None:
    """The stack of a model whose own code gave `own` for a token; None where there is none or it differs."""
    try:
        stack = Stack(model)
    except (Unfit, ModelError, AttributeError):
        return None
    if len(known) > stack.most_rows:
        return None
    return stack if stack.agrees(own, known, cache) else None


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
