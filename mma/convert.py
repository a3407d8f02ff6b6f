"""Published adapters of LaVIN to a checkpoint folder and back; the program is `mma.lavin.convert`."""

from llava.runtime.program import run_program
from mma.lavin.convert import build_parser, export_file, import_file, main

__all__ = ["build_parser", "export_file", "import_file", "main"]

if __name__ == "__main__":
    run_program(main)
