"""`python -m llava.convert` under its former name, with the commands `to-hf` and `from-hf`."""

from llava.convert.__main__ import build_parser, main
from llava.convert.hf import from_hf, to_hf
from llava.runtime.program import run_program

__all__ = ["build_parser", "from_hf", "main", "to_hf"]

if __name__ == "__main__":
    run_program(main)
