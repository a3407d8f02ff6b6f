"""Continuous batching of transformers, refused where the routing of a call could not reach its layers.

It reads the texts of many requests in one row and a prompt in several passes, in a thread of its own, so there is no
call that has a prompt, a task or weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hydralora.tuner.config import RoutingUnit
from hydralora.tuner.routing.given import NAMES

BATCHING = "init_continuous_batching"
"""Method of a model through which every form of it begins, `generate_batch` included."""


BATCHED = "generate_batch"
"""The form of it that takes further arguments, which it would not hand to the model."""


def refuse_routing_arguments(kwargs: Mapping[str, Any]) -> None:
    """Stop a call of `generate_batch` that asks for a routing.

    Raises:
        ValueError: names the arguments.
    """
    given = [name for name in NAMES if kwargs.get(name) is not None]
    if given:
        raise ValueError(f"generate_batch: {', '.join(given)} would not reach the layers; use generate")


def refuse_batching(model: nn.Module, passes: Any) -> None:
    """Stop continuous batching before it starts.

    Args:
        model: the one that generates.
        passes: of its layers.

    Raises:
        ValueError: an active adapter routes by sequence or by task, or the caller asks for a routing.
    """
    asked = passes.given.get() is not None
    layers = [layer for layer in model.modules() if getattr(layer, "passes", None) is passes]
    units = {
        layer.routing[name]: name
        for layer in layers
        if not layer.disable_adapters
        for name in layer.active_adapters
        if layer.experts.get(name, 1) > 1
    }
    for unit in (RoutingUnit.SEQUENCE, RoutingUnit.TASK):
        if unit in units and not asked:
            raise ValueError(
                f"generate_batch: adapter '{units[unit]}' routes by {unit}, and continuous batching reads the texts of "
                "several requests in one row, prompts in parts, so that no call says which prompt or task a token "
                "belongs to. Use generate, or an adapter that routes by token"
            )
    if asked and units:
        raise ValueError(
            "generate_batch: a routing is asked for in this thread, and continuous batching runs the model in "
            "another one, where it would not hold. Use generate"
        )
