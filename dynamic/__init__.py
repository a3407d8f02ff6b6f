"""Dynamic-LLaVA (ICLR 2025): learned predictors that drop vision and text tokens from one decoder layer on.

`layer.py` holds the mathematics, `model.py` puts the predictors into a decoder, `extension.py` plugs them into llava.
`rules/` drops image tokens of any LLaVA by rules without training: `dynamic.attach(model, rule="fastv", keep=0.25)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamic.rules.handle import attach, reduced

__all__ = ["attach", "reduced"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are used: torch takes seconds."""
    if name in __all__:
        return getattr(importlib.import_module("dynamic.rules.handle"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
