"""LaVIN's MME evaluation under its original name; the program is `mma.lavin.eval_mme`."""

from llava.runtime.program import run_program
from mma.lavin.eval_mme import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
