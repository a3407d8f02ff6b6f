"""What the program for lm-evaluation-harness and our model type in it both need; nothing here needs torch."""

from __future__ import annotations

import importlib.util

from llava.errors import FlagError

MODEL_TYPE = "hydralora"
"""Value of the harness's `--model`."""


def require_harness() -> None:
    """Refuse to run without the harness.

    Raises:
        FlagError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise FlagError("lm-evaluation-harness is not installed; pip install 'llava-extensions[harness]'")
