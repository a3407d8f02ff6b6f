"""The warning about library versions that were never tested, where this project's `llava`, which has it, is installed.

hydralora also runs without it, and next to upstream's `llava`, which must not be imported for this: that loads a model.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def has_llava() -> bool:
    """Whether an import of `llava` would give this project's; nothing is imported."""
    try:
        found = importlib.util.find_spec("llava")
    except (ImportError, ValueError):  # an import hook refuses it, or a stand-in without a spec is loaded
        return False
    folders = (found.submodule_search_locations or []) if found else []
    return any((Path(folder) / "runtime" / "versions.py").is_file() for folder in folders)


def warn_of_untested() -> None:
    """Warn once of every library outside its tested range, as far as the ranges are recorded."""
    if has_llava():
        from llava.runtime.versions import warn_once

        warn_once()
