"""`python -m llava.convert to-original` under its former name."""

from functools import partial
from typing import TYPE_CHECKING

from llava.convert import __main__ as program
from llava.runtime.program import run_program
from llava.runtime.starting.late_names import late_names

if TYPE_CHECKING:
    from llava.convert.original import export_original

__all__ = ["build_parser", "export_original", "main"]

build_parser = partial(program.build_parser, "to-original")
main = partial(program.main, command="to-original")

__getattr__ = late_names(__name__, {"export_original": "llava.convert.original"})

if __name__ == "__main__":
    run_program(main)
