"""A model for one pass, and methods under the names of others: what upstream's classes have no argument for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def with_children(module: Any, **children: nn.Module) -> Any:
    """The same module with some other children, for one call; it shares everything else with the module."""
    view = object.__new__(type(module))
    vars(view).update(vars(module))
    vars(view)["_modules"] = {**module._modules, **children}
    return view


def like(inner: Callable[..., Any], outer: Callable[..., Any], argument: str) -> Any:
    """The function `outer` with name and signature of `inner`, and one keyword argument more.

    transformers reads from signatures what `generate` may pass on.
    """
    signature = inspect.signature(inner)
    parameters = list(signature.parameters.values())
    place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(place, inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY, default=None))
    found: Any = functools.wraps(inner)(outer)
    found.__signature__ = signature.replace(parameters=parameters)
    return found
