"""The weights with which the experts of a layer act, from the router to the call that overrides it.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hydralora.layer import Routing, routing_of
from hydralora.tuner.config import RoutingUnit
from hydralora.tuner.routing.given import Given, for_tokens, forced_weights, task_numbers
from hydralora.tuner.routing.rule import Rule
from hydralora.tuner.sequence import sequence_weights


class RoutedLayer(Protocol):
    """What this module needs of a layer, by the name of the adapter; `HydraLoraLayer` is one."""

    experts: dict[str, int]
    rules: dict[str, Rule]
    lora_tasks: Mapping[str, Any]
    observers: list[Callable[[Routing], None]]
    passes: Any
    training: bool

    def route(self, adapter_name: str, x: Tensor) -> Tensor:
        """Probabilities (..., E) of the router."""


def acting_weights(layer: RoutedLayer, adapter_name: str, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """Weights of the experts for `x`, which the observers of the layer see too.

    Args:
        layer: the layer.
        adapter_name: the adapter.
        x: (..., in_features); (B, T, in_features) or (B * T, in_features) where rows differ.
        rows: which rows of the batch `x` holds, in a batch of several adapters; None: all.

    Returns:
        float32 that broadcasts to (..., E).

    Raises:
        GivenRoutingError: the call asks for what this adapter or this layer cannot do, or does not name its tasks.
        ValueError: routing by sequence of an input whose tokens are not those of the batch, or that continues a
            prompt which this adapter has not seen.
    """
    given = layer.passes.given_now() if layer.experts[adapter_name] > 1 else None
    rule = layer.rules[adapter_name]
    # Broadcasts to (..., E).
    by_task = rule.tasks and adapter_name in layer.lora_tasks
    probabilities = task_weights(layer, adapter_name, x, given, rows) if by_task else layer.route(adapter_name, x)
    weights = probabilities if rule.plain else _decided(layer, adapter_name, probabilities, rows, given)
    if given is not None and given.forces:
        asked = for_tokens(forced_weights(given, layer.experts[adapter_name], adapter_name), x, given.shape, rows)
        # Every process uses every weight, whatever its rows ask for: the router has a gradient of zero here.
        used = torch.is_grad_enabled() and probabilities.requires_grad
        weights = asked + 0 * probabilities if used else asked
    if layer.observers:
        full = torch.Size((*x.shape[:-1], weights.shape[-1]))
        routing = routing_of(_in(full, weights), None if weights is probabilities else _in(full, probabilities))
        for observe in layer.observers:
            observe(routing)
    return layer.with_losses(adapter_name, weights, probabilities) if layer.training else weights


def _in(shape: torch.Size, weights: Tensor) -> Tensor:
    """Weights that broadcast to a shape, in it; without an operation if they have it."""
    return weights if weights.shape == shape else weights.expand(shape)


def leaves_out(layer: RoutedLayer, adapter_name: str) -> bool:
    """Whether the adapter's rule leaves experts out here: weights of zero are its choice, and not the call's."""
    if not layer.rules[adapter_name].chooses:
        return False
    given = layer.passes.given_now()
    return given is None or not given.forces


def _decided(
    layer: RoutedLayer, adapter_name: str, probabilities: Tensor, rows: Tensor | None, given: Given | None
) -> Tensor:
    """What the adapter itself decides for these probabilities of its router or table."""
    rule = layer.rules[adapter_name]
    if layer.experts[adapter_name] == 1 or (given is not None and given.forces):
        return probabilities
    if rule.unit == RoutingUnit.SEQUENCE:
        probabilities = sequence_weights(layer.passes.note, (id(layer), adapter_name), probabilities, rows)
    return rule.weights(probabilities)


def task_weights(
    layer: RoutedLayer, adapter_name: str, x: Tensor, given: Given | None, rows: Tensor | None = None
) -> Tensor:
    """Probabilities of the experts for the tasks that the call names, in the shape of `for_tokens`.

    Raises:
        GivenRoutingError: the call names none, or unknown ones.
    """
    rule, table = layer.rules[adapter_name], layer.lora_tasks[adapter_name]
    if given is not None and given.forces and given.tasks is None:
        # Nothing depends on the tasks; the table is used all the same, as in every process.
        return table(torch.zeros((), dtype=torch.long, device=x.device), rule.temperature)
    numbers = task_numbers(given, rule.tasks, adapter_name).to(x.device)
    return for_tokens(table(numbers, rule.temperature), x, None if given is None else given.shape, rows)


def fixed_weights(layer: RoutedLayer, adapter_name: str, given: Given) -> Tensor:
    """The weights (E,) float32 that hold for every input of a call with `given`, without gradient.

    Raises:
        GivenRoutingError: they depend on the input or on the row.
    """
    experts = layer.experts[adapter_name]
    rule = layer.rules[adapter_name]
    if experts == 1:
        return torch.ones(1)
    if given.forces:
        weights = forced_weights(given, experts, adapter_name)
    elif rule.unit == RoutingUnit.TASK:
        table = layer.lora_tasks[adapter_name]
        numbers = task_numbers(given, rule.tasks, adapter_name).to(table.weight.device)
        weights = rule.weights(table(numbers, rule.temperature))
    else:
        raise ValueError(f"adapter '{adapter_name}' routes by {rule.unit}, so that its weights depend on the input")
    if weights.ndim != 1:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} differ between rows; give one vector, expert or task"
        )
    return weights.detach()
