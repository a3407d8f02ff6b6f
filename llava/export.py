"""`python -m llava.convert to-hf` under a former name, with the former flags `--model-path` and `--out`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.convert.__main__ import ANY_CHECKPOINT, add_hf_options, write_hf
from llava.runtime.program import run_program
from llava.runtime.starting.late_names import late_names

if TYPE_CHECKING:
    from llava.convert.hf import to_hf

__all__ = ["build_parser", "main", "to_hf"]

__getattr__ = late_names(__name__, {"to_hf": "llava.convert.hf"})


def build_parser() -> argparse.ArgumentParser:
    """The former command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.export",
        description="Former name of `python -m llava.convert to-hf CHECKPOINT OUTPUT`, whose work it does.",
    )
    parser.add_argument("--model-path", dest="checkpoint", required=True, help=ANY_CHECKPOINT)
    parser.add_argument("--out", dest="output", required=True, help="folder to write; must not exist")
    add_hf_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run `to-hf`; see `llava.convert.__main__.main`."""
    return write_hf(build_parser().parse_args(argv))


if __name__ == "__main__":
    run_program(main)
