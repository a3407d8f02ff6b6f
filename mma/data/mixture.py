"""The chatbot mixture; the program is `mma.lavin.data.mixture`."""

from llava.runtime.program import run_program
from mma.lavin.data.mixture import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
