"""Merge the answers of several chunks into one file, for the scripts that share the questions among GPUs and machines.

Usage: `python -m llava.eval.merge --output merge.jsonl 2_0.jsonl 2_1.jsonl`. Without parts, it only sees whether the
output may be replaced. The output appears whole or not at all, and only over an earlier file of answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.errors import FlagError
from llava.eval.answering.recognition import ANSWER_SHAPES, check_writable, recognize_rows, refuse_unless_rows
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.merge", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", type=Path, metavar="PART", help="answers of each chunk, in order")
    parser.add_argument("--output", required=True, help="file of all answers")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program; returns the output.

    Raises:
        FlagError: the output, or a part, holds something else than answers; or a part is missing or unfinished.
        BadSampleError: a line of a part is broken.
    """
    args = build_parser().parse_args(argv)
    refuse_file("--output", args.output, [Input("PART", part) for part in args.parts])
    output = Path(args.output)
    refuse_unless_rows(output, ANSWER_SHAPES)
    check_writable(output, "--output")
    if not args.parts:
        return output
    for part in args.parts:
        if not part.is_file():
            raise FlagError(f"{part}: no such file; answer that chunk first")
        if recognize_rows(part, ANSWER_SHAPES).torn:
            raise FlagError(f"{part}: its last line is unfinished; answer that chunk to the end first")
    replace_text(output, "".join(part.read_text(encoding="utf-8") for part in args.parts), check=False)
    return output


if __name__ == "__main__":
    run_program(main)
