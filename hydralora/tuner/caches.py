"""Caches of any kind: which one a call has, whether it is filled, and the weights of its prompt, which it carries.

A cache is found by its class: the names of the argument differ between models and versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hydralora.tuner.batch import Weights

ATTRIBUTE = "hydralora_sequence_weights"
"""Where a cache has the weights of its prompt; a copy of the cache copies them."""

REORDERING = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")
"""Methods of a cache that move its rows."""

OTHER_STATES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""Arguments by which models take what they remember, where that is not a `Cache`."""


def given_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a call, or None.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """
    return _first((*args, *kwargs.values()))


def cache_of(output: Any) -> Cache | None:
    """The cache in the output of a model, a dataclass or a tuple, or None."""
    if isinstance(output, tuple | list):
        return _first(output)
    return _first([getattr(output, name) for name in getattr(type(output), "__dataclass_fields__", {})])


def strange_state(kwargs: Mapping[str, Any]) -> str:
    """The name of an argument that continues a text from something else than a `Cache`; empty without one."""
    return next((name for name in OTHER_STATES if kwargs.get(name) is not None), "")


def is_filled(cache: Cache) -> bool:
    """Whether a pass with this cache continues what an earlier one has read; of attention and of recurrent layers."""
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # all layers are recurrent
        return bool(cache.has_previous_state())


def carry(cache: Cache | None, weights: Weights) -> None:
    """Let a cache carry the weights of its prompt, through reordering too; None: there is no cache."""
    if cache is None:
        return
    setattr(cache, ATTRIBUTE, weights)
    if torch.compiler.is_compiling():
        return
    for name in REORDERING:
        if hasattr(type(cache), name) and name not in vars(cache):
            setattr(cache, name, Following(cache, name))


def carried(cache: Cache) -> Weights | None:
    """The weights that a cache carries, or None."""
    found: Weights | None = getattr(cache, ATTRIBUTE, None)
    return found


@dataclass(frozen=True)
class Following:
    """A method of a cache that moves rows; the weights of the prompts follow them."""

    cache: Cache
    name: str

    def __call__(self, moved: Tensor | int) -> Any:
        """Move the rows: `moved` is an index of rows, or how often each is repeated."""
        result = getattr(type(self.cache), self.name)(self.cache, moved)
        weights = carried(self.cache) or {}
        after = {}
        for key, kept in weights.items():
            rows = torch.arange(len(kept.weights), device=kept.weights.device)
            after[key] = kept.rows(moved if isinstance(moved, Tensor) else rows.repeat_interleave(moved))
        setattr(self.cache, ATTRIBUTE, after)
        return result


def _first(values: Iterable[Any]) -> Cache | None:
    for value in values:
        if isinstance(value, Cache):
            return value
    return None
