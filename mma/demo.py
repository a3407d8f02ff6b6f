"""LaVIN's chat page under its original name; the program is `mma.lavin.demo`."""

from llava.runtime.program import run_program
from mma.lavin.demo import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
