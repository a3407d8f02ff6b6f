"""`python -m llava.convert` under its former name, with the commands `to-hf` and `from-hf`."""

from typing import TYPE_CHECKING

from llava.convert.__main__ import build_parser, main
from llava.runtime.program import run_program
from llava.runtime.starting.late_names import late_names

if TYPE_CHECKING:
    from llava.convert.hf import from_hf, to_hf

__all__ = ["build_parser", "from_hf", "main", "to_hf"]

__getattr__ = late_names(__name__, {"from_hf": "llava.convert.hf", "to_hf": "llava.convert.hf"})

if __name__ == "__main__":
    run_program(main)
