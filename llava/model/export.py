"""`python -m llava.convert to-original` under its former name."""

from functools import partial

from llava.convert import __main__ as program
from llava.convert.original import export_original
from llava.runtime.program import run_program

__all__ = ["build_parser", "export_original", "main"]

build_parser = partial(program.build_parser, "to-original")
main = partial(program.main, command="to-original")

if __name__ == "__main__":
    run_program(main)
