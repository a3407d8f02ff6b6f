"""Write the LLaVA that a base and a difference make (upstream `llava/model/apply_delta.py`).

Usage: `python -m llava.model.apply_delta --base-model-path BASE --target-model-path OUTPUT --delta-path DELTA`.
"""

from __future__ import annotations

import argparse
import operator
from collections.abc import Sequence
from pathlib import Path

from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python -m llava.model.apply_delta", description=__doc__.splitlines()[0])
    parser.add_argument("--base-model-path", required=True, help="folder of the language model it was made from")
    parser.add_argument("--target-model-path", required=True, help="folder to write; must not exist")
    parser.add_argument("--delta-path", required=True, help="folder with the difference")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    from llava.model.delta import combine

    folders = Path(args.base_model_path), Path(args.delta_path), Path(args.target_model_path)
    output = combine(*folders, operation=operator.add, difference=True)
    print(f"written: {output}")


if __name__ == "__main__":
    run_program(main)
