"""Answer MMBench's questions with a sparse model."""

from llava.eval.model_vqa_mmbench import build_parser, main
from llava.runtime.program import run_program

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
