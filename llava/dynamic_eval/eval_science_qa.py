"""ScienceQA's accuracy (original `llava/dynamic_eval/eval_science_qa.py`)."""

from llava.eval.eval_science_qa import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
