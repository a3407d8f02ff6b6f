"""LLaVA-1.5 for today's torch and transformers, with seams for extensions.

Public names, module paths, command lines and file formats are those of upstream LLaVA; the code is our own.
`docs/architecture.md` is the map of the package, `python -m llava` lists the programs. The names below are imported
when they are first used, so that `import llava` takes no time and needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llava.runtime.foreign_lines import drop_foreign_lines

if TYPE_CHECKING:
    from llava.extension import Extension, installed_extensions
    from llava.model.builder import load_pretrained_model

__version__ = "0.1.0"
__all__ = ["Extension", "__version__", "installed_extensions", "load_pretrained_model"]

MODULES = {
    "Extension": "llava.extension",
    "installed_extensions": "llava.extension",
    "load_pretrained_model": "llava.model.builder",
}
"""Where each lazy name is defined."""


def __getattr__(name: str) -> Any:
    """A public name, from its module."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    """What the module has, lazy names included."""
    return sorted({*globals(), *__all__})


drop_foreign_lines()
