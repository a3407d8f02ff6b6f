"""Answer Q-Bench's questions with a sparse model."""

from llava.eval.model_vqa_qbench import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
