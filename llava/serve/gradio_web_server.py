"""Upstream's name of `llava.serve.web`: the program is there."""

from llava.runtime.program import run_program
from llava.serve.web import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    run_program(main)
