"""TextVQA's accuracy (original `llava/dynamic_eval/eval_textvqa.py`)."""

from llava.eval.eval_textvqa import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
