"""Published adapters of LaVIN to a checkpoint folder and back; the program is `mma.lavin.convert`."""

from typing import TYPE_CHECKING

from llava.runtime.program import run_program
from llava.runtime.starting.late_names import late_names
from mma.lavin.convert import build_parser, main

if TYPE_CHECKING:
    from mma.lavin.adapter_files import export_file, import_file

__all__ = ["build_parser", "export_file", "import_file", "main"]

__getattr__ = late_names(__name__, {"export_file": "mma.lavin.adapter_files", "import_file": "mma.lavin.adapter_files"})

if __name__ == "__main__":
    run_program(main)
