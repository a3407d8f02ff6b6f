"""Gradient checkpointing: what is recomputed later sees the note of its own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes under which a module keeps the function that checkpoints: transformers', and torch's wrapper for FSDP."""


class Carrier(Protocol):
    """Who gives a function the note of the present pass: `Passes`."""

    def carried(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with the note."""


@dataclass(frozen=True)
class BoundCheckpoint:
    """A function like `torch.utils.checkpoint.checkpoint` whose recomputation has the note of its own pass.

    Attributes:
        checkpoint: the function that does the work.
        passes: whose notes are carried.
    """

    checkpoint: Callable[..., Any]
    passes: Carrier

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function`."""
        if torch.compiler.is_compiling():  # a compiled backward pass recomputes operations, and runs no Python
            return self.checkpoint(function, *args, **kwargs)
        return self.checkpoint(self.passes.carried(function), *args, **kwargs)


def bind_checkpoints(model: nn.Module, passes: Carrier) -> None:
    """Let every function that checkpoints a layer of `model` carry the note."""
    for module, attribute, function in _checkpoint_functions(model):
        bound = function
        while isinstance(bound, BoundCheckpoint) and bound.passes is not passes:
            bound = bound.checkpoint
        if not isinstance(bound, BoundCheckpoint):
            setattr(module, attribute, BoundCheckpoint(function, passes))


def release_checkpoints(model: nn.Module, passes: Carrier) -> None:
    """Take back what `bind_checkpoints` has done."""
    for module, attribute, function in _checkpoint_functions(model):
        if isinstance(function, BoundCheckpoint) and function.passes is passes:
            setattr(module, attribute, function.checkpoint)


def _checkpoint_functions(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The functions that checkpoint something in `model`: the module, the attribute and its value."""
    for module in model.modules():
        for attribute in CHECKPOINT_FUNCTIONS:
            if callable(function := vars(module).get(attribute)):
                yield module, attribute, function
