"""POPE's scores (original `llava/dynamic_eval/eval_pope.py`)."""

from llava.eval.eval_pope import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
