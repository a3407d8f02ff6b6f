r"""Check data files before training: every problem of every row, lengths, and a page of sample prompts.

python -m llava.data.check a.json b.jsonl --image_folder images --model_name_or_path checkpoints/llava-v1.5-7b \
    --version v1 --model_max_length 2048 --html check.html

Prints what it finds and ends with status 1 if there are problems.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from llava.runtime.program import run_program
from llava.runtime.starting.late_names import late_names
from llava.train.data_check import build_parser, main

if TYPE_CHECKING:
    from llava.train.data_check_settings import settings_of

__all__ = ["build_parser", "main", "settings_of"]

__getattr__ = late_names(__name__, {"settings_of": "llava.train.data_check_settings"})

if __name__ == "__main__":
    run_program(lambda: sys.exit(main()))
