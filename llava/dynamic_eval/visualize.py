"""`dynamic.visualize` under its original name (upstream `llava/dynamic_eval/visualize.py`)."""

from dynamic.visualize import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
