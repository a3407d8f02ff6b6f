"""A decoder layer with adapters: a class whose `forward` takes the routing as an argument.

`adapt` turns a layer into an instance of a subclass of its own class, and `release` turns it back. Modules, parameters
and state-dict keys stay where they are. Everything that a layer needs reaches it through the arguments of `forward`, so
gradient checkpointing, `torch.compile` and `torch.export` see it.

Shape letters: B batch, L sequence length, D width, A adapters per layer, h hidden width of an adapter.
"""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mma.layer import Mixed, through

CHILD = "adapter"
"""Name of the adapter within the norm whose output it changes."""

ROUTING = "modality_routing"
"""Keyword argument of a decoder layer with adapters, see `AdaptedLayer.forward`."""

LayerRouting = Tensor | tuple[Mixed, ...]
"""What that argument may be for one layer."""

FIRST_POSITION: LayerRouting = ()
"""Its value with which each sequence is routed by its own first position."""


@dataclass(frozen=True)
class PassRouting:
    """The routing of all layers in one pass: the same argument for each of them, which takes its own part.

    Attributes:
        layers: the adapters of each layer, on its device.
        chosen: (B, 1 or L, entries), see `mma.layer.through`; None if all samples are of one modality.
    """

    layers: tuple[tuple[Mixed, ...], ...]
    chosen: Tensor | None = None


STEPS = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
"""The children of a layer that can be adapted."""


class AdaptedLayer(nn.Module):
    """The steps of a layer of Llama's kind, with the adapters of its norms; a base of every class that `adapt` makes.

    Attributes:
        plain: the class of the layer without adapters.
        arguments: names of the positional arguments of the plain layer that follow `hidden_states`.
        drop_path: probability of skipping attention or MLP for a whole sample in training.
        layer_index: which of `PassRouting.layers` is its own.
    """

    plain: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]
    drop_path: float
    layer_index: int
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        modality_routing: LayerRouting | PassRouting | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the layer.

        Args:
            hidden_states: (B, L, D).
            args: further positional arguments of the plain layer.
            modality_routing: weights (B, A, 2) of the two up-projections of each adapter, or (B, L, A, 2) token by
                token; or each adapter for known weights, alike for all samples; or those of all layers; or
                `FIRST_POSITION`.
            kwargs: passed to the attention, like `args`.

        Returns:
            What the plain layer returns: (B, L, D) in transformers 5, a tuple that begins with it in transformers 4.
            With `FIRST_POSITION` the pair of (B, L, D) and the weights (B, A, 2).

        Raises:
            RuntimeError: the routing is missing.
        """
        if modality_routing is None:
            raise RuntimeError(
                f"a decoder layer with adapters was called without '{ROUTING}'; call the model, which routes by the "
                "modality of each sample"
            )
        if args:
            kwargs = self._by_name(args, kwargs)
        chosen = None
        if isinstance(modality_routing, PassRouting):
            chosen, modality_routing = modality_routing.chosen, modality_routing.layers[self.layer_index]
        hidden, first = _adapted(self.input_layernorm, hidden_states, modality_routing, 0, chosen)
        hidden, *reported = self.self_attn(hidden_states=hidden, **kwargs)
        attended = hidden_states + drop_path(hidden, self.drop_path, self.training)
        hidden, second = _adapted(self.post_attention_layernorm, attended, modality_routing, 1, chosen)
        output = attended + drop_path(self.mlp(hidden), self.drop_path, self.training)
        if first is not None:
            return output, torch.stack([first] if second is None else [first, second], dim=1)
        return _returned(output, reported, kwargs)

    def attention_input(
        self, hidden_states: Tensor, modality_routing: LayerRouting | PassRouting | None = None, **kwargs: Any
    ) -> Tensor:
        """(B, L, D): what the attention of this layer is given, with arguments as of `forward`.

        Whoever computes attention weights of a layer in front of it asks for this.
        """
        chosen = None
        if isinstance(modality_routing, PassRouting):
            chosen, modality_routing = modality_routing.chosen, modality_routing.layers[self.layer_index]
        routing = FIRST_POSITION if modality_routing is None else modality_routing
        return _adapted(self.input_layernorm, hidden_states, routing, 0, chosen)[0]

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments behind the hidden states by the names that the plain layer has for them."""
        named = dict(zip(self.arguments, args, strict=False))
        twice = sorted(named.keys() & kwargs.keys())
        if len(args) > len(self.arguments) or twice:
            raise TypeError(
                f"{type(self).__name__} takes {len(self.arguments)} positional arguments after hidden_states "
                f"{self.arguments}; given are {len(args)}, and by name too {twice}"
            )
        return {**named, **kwargs}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as the plain class, from which the reader makes this one again."""
        return _empty, (self.plain,), *tuple(super().__reduce_ex__(protocol))[2:]


def _adapted(
    norm: nn.Module, x: Tensor, routing: LayerRouting, number: int, chosen: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What follows a norm: its output (B, L, D) with the update of its adapter, if it has one.

    The second value is the weights (B, 2) if the first position has decided them, else None.
    """
    x = norm(x)
    if isinstance(routing, tuple) and routing:
        known = number < len(routing)
        return through(x, routing[number], chosen if chosen is None else chosen.to(x.device)) if known else x, None
    adapter: Any = getattr(norm, CHILD, None)
    if adapter is None:
        return x, None
    if isinstance(routing, Tensor):
        return adapter(x, routing[..., number, :].to(x.device)), None
    weights = adapter.route(x[:, 0])
    return adapter(x, weights), weights


def _returned(output: Tensor, reported: list[Any], kwargs: dict[str, Any]) -> Any:
    """The output of a layer in the form of its transformers.

    In transformers 4 an attention reports a map and a cache, and a layer returns a tuple with those that were asked
    for; in transformers 5 it reports a map alone, and a layer returns the hidden states.
    """
    if len(reported) < 2:
        return output
    attention, cache = reported
    optional = [(attention, kwargs.get("output_attentions")), (cache, kwargs.get("use_cache"))]
    return (output, *(value for value, wanted in optional if wanted))


def drop_path(x: Tensor, probability: float, training: bool) -> Tensor:
    """In training, `x` (B, L, D) with zeros for a sample with `probability`, the others scaled so that the mean stays.

    Otherwise `x` itself.
    """
    if not training or not probability:
        return x
    kept = torch.rand(len(x), 1, 1, device=x.device) >= probability
    return x * (kept / (1 - probability)).to(x.dtype)


def problem(layer: nn.Module) -> str | None:
    """Why a layer cannot be adapted, or None.

    Its `forward` is replaced, so it must be one of Llama's steps, and nobody else may have replaced it in the object.
    """
    kind, children = type(layer), {name for name, _ in layer.named_children()}
    if children != STEPS:
        return f"a {kind.__name__} has the children {sorted(children)}, expected {sorted(STEPS)}"
    own = [name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))]
    if own:
        return f"a {kind.__name__} has tensors of its own {own}, which the steps of an adapted layer do not use"
    return replaced_forward(layer)


def replaced_forward(module: nn.Module) -> str | None:
    """Why the class of a module cannot decide what it computes, or None."""
    kind = type(module)
    if "forward" in vars(module) and not _bound(module, kind):
        return f"'forward' of a {kind.__name__} was replaced in the object; attach adapters before that"
    return None


def adapt(layer: Any, probability: float = 0.0, index: int = 0) -> None:
    """Make a layer without `problem` one that takes the routing; its adapters are put into its norms separately.

    Args:
        layer: decoder layer.
        probability: of `drop_path`.
        index: its number in the decoder.
    """
    layer.drop_path, layer.layer_index = probability, index
    become(layer, adapted_class(type(layer)))


def release(layer: Any) -> None:
    """Give an adapted layer its own class back."""
    del layer.drop_path, layer.layer_index
    become(layer, layer.plain)


@functools.cache
def adapted_class(plain: type[nn.Module]) -> type[AdaptedLayer]:
    """The class of adapted layers of a class; of the same name, by which others choose what to wrap or to split."""
    positional = [
        name
        for name, parameter in inspect.signature(plain.forward).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    own = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    # Without self and hidden_states
    return type(plain.__name__, (AdaptedLayer, plain), {**own, "plain": plain, "arguments": tuple(positional[2:])})


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module, also for programs that keep its bound `forward` in the object.

    accelerate does, where it places the layers of a model on several devices.
    """
    held = _bound(module, type(module))
    module.__class__ = kind
    for name in held:
        vars(module)[name] = types.MethodType(kind.forward, module)


def _bound(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Attributes of the object that are the `forward` of class `kind`, bound to it."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is kind.forward
    ]


def _empty(plain: type[nn.Module]) -> nn.Module:
    kind = adapted_class(plain)
    return kind.__new__(kind)
