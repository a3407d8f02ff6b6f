"""Which modules FSDP2 gathers at a time: the layers that repeat in a model, found by structure.

accelerate takes names of classes, by default those that transformers wrote down; layers that were given another class
would be left to the root, which holds all of its parameters at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the outermost stacks: lists of at least two modules with parameters, in no other such list."""
    return list(_layers(model))


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        stack = list(child) if isinstance(child, nn.ModuleList) else []
        if len(stack) > 1 and all(any(True for _ in layer.parameters()) for layer in stack):
            yield from stack
        else:
            yield from _layers(child)


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the classes of `repeated_layers`, as accelerate's `transformer_cls_names_to_wrap` takes them."""
    return sorted({type(layer).__name__ for layer in repeated_layers(model)})
