"""`python -m llava.convert` under its former name."""

from llava.convert.__main__ import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
