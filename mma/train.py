"""LaVIN's training under its original name; the program is `mma.lavin.train`."""

from llava.runtime.program import run_program
from mma.lavin.train import build_parser, main, parse_args

__all__ = ["build_parser", "main", "parse_args"]

if __name__ == "__main__":
    run_program(main)
