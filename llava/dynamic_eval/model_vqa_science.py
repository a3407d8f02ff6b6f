"""Answer ScienceQA's questions with a sparse model (original `llava/dynamic_eval/model_vqa_science.py`)."""

from llava.eval.model_vqa_science import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
