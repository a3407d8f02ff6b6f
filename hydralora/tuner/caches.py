"""The key-value cache of a call, found by its class: the names of the argument differ between models and versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.cache_utils import Cache


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


def _first(values: Iterable[Any]) -> Cache | None:
    for value in values:
        if isinstance(value, Cache):
            return value
    return None
