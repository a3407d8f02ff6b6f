"""What becomes of transformers' options in `python -m mma.train`: those of which LaVIN has its own name are refused."""

from __future__ import annotations

from llava.runtime.trainer_options.row import Table, but, refused
from llava.train.option_table import LLAVA_OPTIONS
from mma.lavin.train_arguments import INSTEAD

LAVIN_OPTIONS: Table = but(
    LLAVA_OPTIONS,
    *(
        refused(name, "LaVIN has an option of its own for it", f"use {other}")
        for name, other in INSTEAD.items()
        if name in LLAVA_OPTIONS
    ),
)
