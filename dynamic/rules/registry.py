"""Which rules there are: the built-in ones, and those that installed packages declare.

A package declares a module that registers rules by the entry-point group "llava.reduction_rules".
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points

from dynamic.rules.rule import Rule, registered
from llava.errors import FlagError

ENTRY_POINT_GROUP = "llava.reduction_rules"

BUILT_IN = (
    "sampled",
    "grid",
    "pool",
    "visionzip",
    "hired",
    "divprune",
    "scope",
    "vispruner",
    "cdpruner",
    "fastv",
    "dart",
    "pyramiddrop",
    "sparsevlm",
)
"""Modules of this folder, a rule each."""

LEARNED = "learned"
"""The name of the predictors of a Dynamic-LLaVA checkpoint among the rules."""


@functools.cache
def _load() -> None:
    for name in BUILT_IN:
        importlib.import_module(f"dynamic.rules.{name}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        point.load()


def rules() -> dict[str, type[Rule]]:
    """All rules by name, sorted."""
    _load()
    return dict(sorted(registered().items()))


def find_rule(name: str) -> type[Rule]:
    """The rule of a name.

    Raises:
        FlagError: none has it; lists those that are known.
    """
    found = rules().get(name)
    if found is None:
        raise FlagError(f"--reduce {name}: no rule has this name; known are {', '.join([*rules(), LEARNED])}")
    return found
