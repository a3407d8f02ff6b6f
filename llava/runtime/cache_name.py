"""What transformers calls a key-value cache: `past_key_values` before 5.24, `cache` since.

The name is read from the signature of the function that is called, so that every admitted version works and a later
rename fails in one place. No other module knows either name; ours call the argument `cache`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import Cache
from transformers.generation import GenerationMixin

NAMES = ("cache", "past_key_values")
"""All names under which a function may take a cache; callers of this project's models may use any of them."""

OWN_NAME = NAMES[0]
"""Name of the argument in functions of this project."""

F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def _keyword(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), None)


def cache_keyword(function: Callable[..., Any]) -> str:
    """Name of the argument of a function or class under which it takes a cache.

    Raises:
        TypeError: it takes none under a known name.
    """
    keyword = _keyword(getattr(function, "__func__", function))  # not the bound method: it would keep its object alive
    if keyword is None:
        name = getattr(function, "__qualname__", repr(function))
        raise TypeError(f"{name} has no argument named {' or '.join(NAMES)}, so it cannot be given a cache")
    return keyword


def cache_argument(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """The keyword argument that gives `cache` to `function`."""
    return {cache_keyword(function): cache}


def layer_cache_keyword(layer: nn.Module) -> str:
    """Name of the argument under which a layer takes a cache.

    A class that passes keyword arguments on to the layer it derives from is looked through.

    Raises:
        TypeError: none of its classes takes a cache under a known name.
    """
    for kind in type(layer).__mro__:
        forward = vars(kind).get("forward")
        if forward is not None and _keyword(forward) is not None:
            return cache_keyword(forward)
    return cache_keyword(type(layer).forward)


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of `generate`, or None."""
    fields = getattr(type(output), "__dataclass_fields__", {})
    name = next((name for name in NAMES if name in fields), None)
    return None if name is None else getattr(output, name)


def takes_cache(function: F) -> F:
    """Let callers of a method with an argument `cache` use any known name of it.

    The signature shows the name that the installed transformers uses, since its `generate` looks there.

    Raises:
        TypeError: (when called) two names are used at once, a cache arrives under an unknown name, or what is given as
            a cache is not one.
    """
    name = getattr(function, "__qualname__", repr(function))

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        given = [known for known in NAMES if kwargs.get(known) is not None]
        if len(given) > 1:
            raise TypeError(f"{name} was given {' and '.join(given)}, which mean the same; pass one of them")
        cache = kwargs.pop(given[0]) if given else None
        for known in NAMES:
            kwargs.pop(known, None)
        if cache is not None:
            if not isinstance(cache, Cache):
                raise TypeError(
                    f"{name}: {given[0]} is a {type(cache).__name__}, not a transformers.Cache; pass a DynamicCache"
                )
            kwargs[OWN_NAME] = cache
        strange = [key for key, value in kwargs.items() if key != OWN_NAME and _looks_like_cache(value)]
        if strange:
            raise TypeError(f"{name} has no argument {strange[0]!r}; pass the cache as {INSTALLED_NAME!r}")
        return function(*args, **kwargs)

    parameters = inspect.signature(function).parameters.values()
    shown = [p.replace(name=INSTALLED_NAME) if p.name == OWN_NAME else p for p in parameters]
    renamed.__signature__ = inspect.signature(function).replace(parameters=shown)  # type: ignore[attr-defined]
    return renamed  # type: ignore[return-value]


def _looks_like_cache(value: Any) -> bool:
    """True for a cache of today, and for a tuple of (key, value) of each layer, as older versions had it."""
    if isinstance(value, Cache):
        return True
    return isinstance(value, tuple | list) and len(value) > 0 and all(_is_key_and_value(layer) for layer in value)


def _is_key_and_value(layer: Any) -> bool:
    return (
        isinstance(layer, tuple | list)
        and len(layer) >= 2
        and all(isinstance(part, Tensor) and part.ndim == 4 for part in layer[:2])
    )


INSTALLED_NAME = cache_keyword(GenerationMixin.prepare_inputs_for_generation)
"""The name that `generate` of the installed transformers uses."""
