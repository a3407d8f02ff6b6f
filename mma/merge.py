"""Adapters merged into the weights, for one modality; the program is `mma.lavin.merge`."""

from typing import TYPE_CHECKING

from llava.runtime.program import run_program
from llava.runtime.starting.late_names import late_names
from mma.lavin.merge import build_parser, main

if TYPE_CHECKING:
    from mma.lavin.merging import merge, merge_checkpoint

__all__ = ["build_parser", "main", "merge", "merge_checkpoint"]

__getattr__ = late_names(__name__, {"merge": "mma.lavin.merging", "merge_checkpoint": "mma.lavin.merging"})

if __name__ == "__main__":
    run_program(main)
