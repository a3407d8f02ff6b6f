"""Training a LLaVA whose tokens are dropped by predictors (Dynamic-LLaVA, upstream `llava/train/train_sparse.py`).

The run of `llava/train/train.py` with two other defaults: `--dynamic True` switches the predictors on, and
`--requires_image True` leaves out rows without an image.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llava.runtime.program import run_program
from llava.train.train import main

DEFAULTS: dict[str, Any] = {"dynamic": True, "requires_image": True}
"""Options whose defaults are not those of `llava/train/train.py`."""

if __name__ == "__main__":
    run_program(partial(main, defaults=DEFAULTS))
