"""How the routed MLP blocks of MLLM-HydraLoRA enter a decoder, and how their routing is observed.

The host is any causal language model of transformers' shape: `get_decoder()` returns the decoder, whose `layers` hold
one gated MLP each. Modules are recognised by what they are, never by words in their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hydralora.config import RoutedMLPConfig
from hydralora.layer import RoutedMLP, RoutedModule, Routing


def is_gated_mlp(module: nn.Module) -> bool:
    """True for `LlamaMLP` and every class built like it: three linear projections and an activation, unadapted."""
    projections = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return (
        not isinstance(module, RoutedMLP)
        and all(isinstance(projection, nn.Linear) for projection in projections)
        and callable(getattr(module, "act_fn", None))
    )


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The layers of the decoder of a causal language model of transformers' shape."""
    return model.get_decoder().layers


def attach(model: nn.Module, config: RoutedMLPConfig, dtype: torch.dtype = torch.float32) -> dict[str, RoutedMLP]:
    """Replace the gated MLP of every decoder layer by a `RoutedMLP` around its very projections, in place.

    The wrapped projections are frozen; everything else keeps its `requires_grad`. The blocks stand on the device of
    the projections (the meta device included) and start as the identity: the outputs of the model do not change.

    Args:
        model: with `get_decoder()`; `get_decoder().layers` are the decoder layers.
        config: of the blocks.
        dtype: of the added parameters.

    Returns:
        The blocks by their name in `model`, in order of the layers.

    Raises:
        ValueError: a layer holds no gated MLP or more than one, or the blocks are attached already.
    """
    layers = decoder_layers(model)
    places = [_only_gated_mlp(layer, index) for index, layer in enumerate(layers)]
    for layer, name in zip(layers, places, strict=True):
        mlp: Any = layer.get_submodule(name)
        block = RoutedMLP(
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
            experts=config.experts,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            dense=config.dense,
            dtype=dtype,
        )
        for projection in (block.gate_proj, block.up_proj, block.down_proj):
            projection.requires_grad_(False)
        block.train(mlp.training)
        parent, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(parent), attribute, block)
    return routed_blocks(model)


def _only_gated_mlp(layer: nn.Module, index: int) -> str:
    """Name within decoder layer number `index` of its gated MLP."""
    names = [name for name, module in layer.named_modules() if is_gated_mlp(module)]
    if any(isinstance(module, RoutedMLP) for module in layer.modules()):
        raise ValueError(f"decoder layer {index} has a routed MLP block already")
    if len(names) != 1:
        raise ValueError(
            f"decoder layer {index} ({type(layer).__name__}) holds {len(names)} gated MLPs, expected 1: a module with "
            "the linear layers gate_proj, up_proj and down_proj and an act_fn, not adapted by something else"
        )
    return names[0]


def routed_blocks(model: nn.Module) -> dict[str, RoutedMLP]:
    """The blocks of `model` by name, in order of the layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedMLP)}


def added_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that `attach` added, by their name in `model`: exactly these are trained and saved."""
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
        self._observers: dict[str, partial[None]] = {}
        self._recorded: dict[str, list[Routing]] = {}

    def start(self) -> None:
        """Begin an empty record; a record that was never stopped (an error in the forward pass) is dropped."""
        self.stop()
        self._recorded = {name: [] for name in self._blocks}
        self._observers = {name: partial(self._note, name) for name in self._blocks}
        for name, block in self._blocks.items():
            block.observers.append(self._observers[name])

    def stop(self) -> dict[str, list[Routing]]:
        """End the record and hand it out: for each block the routings of its forward passes, with their graph."""
        for name, observer in self._observers.items():
            self._blocks[name].observers.remove(observer)
        recorded, self._recorded, self._observers = self._recorded, {}, {}
        return recorded

    def _note(self, name: str, routing: Routing) -> None:
        self._recorded[name].append(routing)


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
        if passes and passes[-1].probabilities.shape[:-1] == batch:
            found[name] = passes[-1]
        elif passes and passes[-1].probabilities.shape[:-1] == (batch[0] * batch[1],):
            found[name] = Routing(*(values.unflatten(0, batch) for values in passes[-1]))
    return found


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record the routing of everything that runs inside a `with` block, for analysis.

    Yields:
        An empty dict that is filled at the end of the block: for each block name the probabilities (B, L, E), without
        graph, of each forward pass in turn (prefill, then one per generated token).
    """
    recorder = RoutingRecorder(routed_blocks(model))
    probabilities: dict[str, list[Tensor]] = {}
    recorder.start()
    try:
        yield probabilities
    finally:
        for name, routings in recorder.stop().items():
            probabilities[name] = [routing.probabilities.detach() for routing in routings]
