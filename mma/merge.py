"""Adapters merged into the weights, for one modality; the program is `mma.lavin.merge`."""

from llava.runtime.program import run_program
from mma.lavin.merge import build_parser, main, merge, merge_checkpoint

__all__ = ["build_parser", "main", "merge", "merge_checkpoint"]

if __name__ == "__main__":
    run_program(main)
