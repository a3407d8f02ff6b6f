"""Answers on MM-Vet to the file that its evaluator reads (upstream's script of this name).

Usage: `python scripts/convert_mmvet_for_eval.py --src answers.jsonl --dst results.json`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.scoring.submission import mmvet
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python scripts/convert_mmvet_for_eval.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--src", type=str, required=True, help="answers file")
    parser.add_argument("--dst", type=str, required=True, help="file to write")
    parser.add_argument("--question-file", default=None, help="what was asked: answers to all of it must be there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    mmvet(args.src, args.dst, args.question_file)


if __name__ == "__main__":
    run_program(main)
