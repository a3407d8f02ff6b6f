"""Answers on VizWiz to the file for its server (upstream's script of this name).

Usage: `python scripts/convert_vizwiz_for_submission.py --annotation-file llava_test.jsonl --result-file answers.jsonl
--result-upload-file upload.json`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.scoring.submission import vizwiz
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python scripts/convert_vizwiz_for_submission.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--annotation-file", type=str, required=True, help="the questions")
    parser.add_argument("--result-file", type=str, required=True, help="answers file")
    parser.add_argument("--result-upload-file", type=str, required=True, help="file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    vizwiz(args.annotation_file, args.result_file, args.result_upload_file)


if __name__ == "__main__":
    run_program(main)
