"""Ask a sparse model one question (original `llava/dynamic_eval/run_dynamic_llava.py`)."""

from llava.eval.run_llava import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
