"""Answer a file of questions at length with a sparse model (original `llava/dynamic_eval/model_vqa.py`)."""

from llava.eval.model_vqa import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
