"""What becomes of transformers' options in `python -m llava.train.train`: what the common table says."""

from __future__ import annotations

from llava.runtime.trainer_options.row import Table
from llava.runtime.trainer_options.table import TABLE

LLAVA_OPTIONS: Table = TABLE
