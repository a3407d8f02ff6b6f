"""Base weights for LaVIN; the program is `mma.lavin.weights.__main__`."""

from llava.runtime.program import run_program
from mma.lavin.weights.__main__ import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
