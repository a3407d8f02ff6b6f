"""How the routed MLP blocks of MLLM-HydraLoRA enter a decoder, and how their routing is observed.

The host is any causal language model of transformers' shape: `get_decoder()` returns the decoder, whose `layers` hold
one gated MLP each. Modules are recognised by what they are, never by words in their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hydralora.block import KINDS, RoutedMLP, adapt, release
from hydralora.config import RoutedMLPConfig
from hydralora.gated import check, only_gated_mlp, reference
from hydralora.layer import RoutedModule, Routing


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The layers of the decoder of a causal language model of transformers' shape.

    Raises:
        ValueError: its decoder has no `layers`.
    """
    decoder = model.get_decoder()
    # A model whose decoder is not found by transformers, as the text part of Llama 4, gives itself.
    owners = [owner for owner in (decoder, *decoder.children()) if hasattr(owner, "layers")]
    if not owners:
        raise ValueError(f"the decoder of {type(model).__name__}, a {type(decoder).__name__}, has no list 'layers'")
    return owners[0].layers


def attach(model: nn.Module, config: RoutedMLPConfig, dtype: torch.dtype = torch.float32) -> dict[str, RoutedMLP]:
    """Make the gated MLP of every decoder layer a `RoutedMLP`, in place.

    Where a layer has several, the one that every token runs through is taken, as the shared expert of Qwen2-MoE; see
    `only_gated_mlp`. Its three projections are frozen; everything else keeps its `requires_grad`. The blocks stand on
    the device of the projections (the meta device included) and start as the identity: the outputs of the model do not
    change, which is tried on random hidden states wherever the weights are there to run.

    Args:
        model: with `get_decoder()`; `get_decoder().layers` are the decoder layers.
        config: of the blocks.
        dtype: of the added parameters.

    Returns:
        The blocks by their name in `model`, in order of the layers.

    Raises:
        ValueError: a layer holds no gated MLP or several without a clear choice, one that does not call its three
            projections, or the blocks are attached already. Nothing has been changed then.
    """
    layers = decoder_layers(model)
    # An MLP that several layers share becomes one block, named by the first of them.
    mlps = dict[nn.Module, int]()
    for index, layer in enumerate(layers):
        mlps.setdefault(layer.get_submodule(only_gated_mlp(layer, index)), index)
    required = {parameter: parameter.requires_grad for mlp in mlps for parameter in mlp.parameters()}
    settings = {name: getattr(config, name) for name in ("experts", "rank", "alpha", "dropout", "dense")}
    made: list[RoutedMLP] = []
    try:
        for mlp, index in mlps.items():
            with _naming_layer(index, layers[index]):
                seen = reference(mlp)
                made.append(adapt(mlp, **settings, dtype=dtype))
                if seen is not None:
                    check(made[-1], *seen)
            for name in KINDS:
                mlp.get_submodule(name).requires_grad_(False)
    except BaseException:
        for block in made:
            release(block)
        for parameter, value in required.items():
            parameter.requires_grad_(value)
        raise
    return routed_blocks(model)


@contextmanager
def _naming_layer(index: int, layer: nn.Module) -> Iterator[None]:
    """Name the decoder layer in the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"decoder layer {index} ({type(layer).__name__}): {error}") from error


def routed_blocks(model: nn.Module) -> dict[str, RoutedMLP]:
    """The blocks of `model` by name, in order of the layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedMLP)}


def routed_modules(model: nn.Module) -> dict[str, RoutedModule]:
    """Every layer with a router by name, in order: routed blocks, updates of attention, layers of the PEFT method."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedModule)}


def added_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of every layer with a router, by their name in `model`.

    Routed MLP blocks, updates of attention layers, and the adapters of the PEFT method: exactly these are trained.
    """
    for module_name, module in routed_modules(model).items():
        for name, parameter in module.added_parameters():
            yield f"{module_name}.{name}", parameter


def block_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that `attach` added, by their name in `model`."""
    for block_name, block in routed_blocks(model).items():
        for name, parameter in block.added_parameters():
            yield f"{block_name}.{name}", parameter


class RoutingRecorder:
    """Collects what layers with a router route between `start` and `stop`.

    A record taken in the forward pass keeps its graph under non-reentrant gradient checkpointing, and a loss on it gets
    exact gradients, provided that the recomputation in the backward pass is not recorded too. Contract: call `stop`
    before the backward pass.

    Args:
        blocks: layers with a router by name, as `routed_blocks` gives them.
    """

    def __init__(self, blocks: Mapping[str, RoutedModule]) -> None:
        self._blocks = dict(blocks)
        self._observers: dict[str, _Note] = {}
        self._recorded: dict[str, list[Routing]] = {}

    def start(self) -> None:
        """Begin an empty record; a record that was never stopped (an error in the forward pass) is dropped."""
        self.stop()
        self._recorded = {name: [] for name in self._blocks}
        self._observers = {name: _Note(self._recorded[name]) for name in self._blocks}
        for name, block in self._blocks.items():
            block.observers.append(self._observers[name])

    def stop(self) -> dict[str, list[Routing]]:
        """End the record and hand it out: for each block the routings of its forward passes, with their graph."""
        for name, observer in self._observers.items():
            self._blocks[name].observers.remove(observer)
        recorded, self._recorded, self._observers = self._recorded, {}, {}
        return recorded


class _Note:
    """Puts routings on a list; an object and no function of a method, as the compiler tells objects apart."""

    def __init__(self, record: list[Routing]) -> None:
        self.record = record

    def __call__(self, routing: Routing) -> None:
        self.record.append(routing)


def of_text(recorded: Mapping[str, Sequence[Routing]], batch: tuple[int, int]) -> dict[str, Routing]:
    """The latest routing, (B, T, E), of every layer that saw the tokens of the text, by the layer's name.

    Some models flatten a batch before a layer, as OPT; (B * T, E) gets its shape back. Layers that did not run, or saw
    other tokens (patches of an image, a choice of the text's), are left out.

    Args:
        recorded: what `RoutingRecorder.stop` hands out.
        batch: (B, T) of the text.
    """
    found: dict[str, Routing] = {}
    for name, passes in recorded.items():
        if passes and (routing := in_rows(passes[-1], batch)) is not None:
            found[name] = routing
    return found


def in_rows(routing: Routing, batch: tuple[int, int]) -> Routing | None:
    """A routing of B * T tokens as (B, T, E), where a layer has flattened them or not; None if it is of others."""
    leading = tuple(routing.probabilities.shape[:-1])
    if leading not in (batch, (batch[0] * batch[1],)):
        return None
    # A reshape to the same shape would be one more operation for every layer.
    return routing if leading == batch else routing.map(lambda values: values.reshape(*batch, -1))


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record the routing of every layer with a router that runs inside a `with` block, for analysis.

    Yields:
        An empty dict that is filled at the end of the block: for each layer's name the probabilities (B, L, E), without
        graph, of each forward pass in turn (prefill, then one per generated token).
    """
    recorder = RoutingRecorder(routed_modules(model))
    probabilities: dict[str, list[Tensor]] = {}
    batches: list[tuple[int, int]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append(batch_of(args, kwargs))

    find = getattr(model, "get_decoder", None)  # a model that has none flattens no batch of a text
    decoder = find() if callable(find) else model
    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    recorder.start()
    try:
        yield probabilities
    finally:
        hook.remove()
        for name, routings in recorder.stop().items():
            # A layer that flattens its tokens, as one with experts of its own, runs once per pass of the decoder.
            rows = zip(routings, batches, strict=True) if len(routings) == len(batches) else ()
            shaped = [in_rows(routing, batch) or routing for routing, batch in rows] or routings
            probabilities[name] = [routing.probabilities.detach() for routing in shaped]


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """(B, L) of what a decoder is called with, ids or embeddings."""
    tokens = next(
        value for value in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if value is not None
    )
    return tokens.shape[0], tokens.shape[1]
