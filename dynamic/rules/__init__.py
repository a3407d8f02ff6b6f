"""Training-free reduction of image tokens: rules under one seam, with one budget.

`rule.py` is the seam, `plan.py` reads a plan from text, `extension.py` carries it out; each rule has a file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamic.rules.handle import Handle, attach, reduced

__all__ = ["Handle", "attach", "reduced"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are used: torch takes seconds."""
    if name in __all__:
        return getattr(importlib.import_module("dynamic.rules.handle"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
