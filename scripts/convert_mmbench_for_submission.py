"""Answers on MMBench to the spreadsheet for its server (upstream's script of this name).

Usage: `python scripts/convert_mmbench_for_submission.py --annotation-file mmbench_dev_20230712.tsv --result-dir answers
--upload-dir answers_upload --experiment llava-v1.5-7b`. Reads `<result-dir>/<experiment>.jsonl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.scoring.matching import add_lenient
from llava.eval.scoring.mmbench import write_spreadsheet
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python scripts/convert_mmbench_for_submission.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--annotation-file", type=str, required=True, help="the benchmark's TSV file")
    parser.add_argument("--result-dir", type=str, required=True, help="folder of answers files")
    parser.add_argument("--upload-dir", type=str, required=True, help="folder of spreadsheets")
    parser.add_argument("--experiment", type=str, required=True, help="name of both files without their endings")
    add_lenient(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    write_spreadsheet(
        args.annotation_file,
        Path(args.result_dir) / f"{args.experiment}.jsonl",
        Path(args.upload_dir) / f"{args.experiment}.xlsx",
        lenient=args.lenient,
    )


if __name__ == "__main__":
    run_program(main)
