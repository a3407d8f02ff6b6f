"""`torch.compile` for the layers of a LLaVA, each in its place.

Compiled is each layer of the decoder and of the tower, not the model around them. The layers of a decoder share one
graph, so compiling takes as long for 32 layers as for one; what depends on the samples of a batch (images, segments,
what an extension does between two layers) stays plain Python, which costs no recompilation. `nn.Module.compile` leaves
module and names as they are: no `_orig_mod` in a state dict, no wrapper around the model.

Lengths and numbers of rows are dynamic: a graph serves all of them, but for a size of 1, which torch compiles by
itself. Activation checkpointing of a layer is part of its graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MOST_GRAPHS = 64
"""Graphs that the layers may have; torch's own limit of 8 counts all layers together, behind it layers run uncompiled.

A decoder with a policy, a tower with adapters, evaluation, rows of a single sample: a few each.
"""


def compiled_layers(llava: Any) -> list[nn.Module]:
    """What is compiled of a `LlavaForCausalLM`: the layers of its decoder, and those of its tower that run."""
    tower = llava.get_vision_tower()
    blocks = [] if tower is None else list(tower.blocks(tower.loaded())[: tower.num_blocks])
    return [*llava.get_model().layers, *blocks]


def compile_layers(llava: Any, backend: Any = "inductor", mode: str | None = None) -> int:
    """Let every layer run through `torch.compile` from its next call; nothing is compiled yet.

    Everything that is added to layers (adapters, extensions) is in place by then.

    Args:
        llava: a `LlavaForCausalLM`.
        backend: as `torch.compile` takes it; with checkpointing one that honors it (`inductor`, `aot_eager`).
        mode: as `torch.compile` takes it.

    Returns:
        The number of layers.
    """
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MOST_GRAPHS)
    # A layer may hand something to observers, as its routing. Torch's compiler refuses effects within a checkpointed
    # function unless they may be left out when it is computed again, which is what observers want.
    settings.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    layers = compiled_layers(llava)
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
    return len(layers)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled layers run as they are, without compiling anything.

    For answers: with a cache each layer would be compiled by itself, for its place in the cache.
    """
    with torch.compiler.set_stance("force_eager"):
        yield
