"""Accuracy of answers on SEED-Bench, and the file for its leaderboard (upstream's script of this name).

Usage: `python scripts/convert_seed_for_submission.py --annotation-file SEED-Bench.json --result-file merge.jsonl
--result-upload-file upload.jsonl`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.eval_seed import evaluate
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python scripts/convert_seed_for_submission.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--annotation-file", type=str, required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", type=str, required=True, help="answers file")
    parser.add_argument("--result-upload-file", type=str, required=True, help="file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    print(evaluate(args.annotation_file, args.result_file, args.result_upload_file))


if __name__ == "__main__":
    run_program(main)
