"""`python -m llava.convert.hf` under its former name."""

from llava.convert.hf import build_parser, from_hf, main, to_hf
from llava.runtime.program import run_program

__all__ = ["build_parser", "from_hf", "main", "to_hf"]

if __name__ == "__main__":
    run_program(main)
