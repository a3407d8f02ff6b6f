"""`python -m llava.convert.original` under its former name."""

from llava.convert.original import build_parser, export_original, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "export_original", "main"]

if __name__ == "__main__":
    run_program(main)
