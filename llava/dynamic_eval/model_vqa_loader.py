"""Answer a file of questions with a sparse model (original `llava/dynamic_eval/model_vqa_loader.py`)."""

from llava.eval.model_vqa_loader import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
