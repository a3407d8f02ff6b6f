"""Answers on VQAv2 to the file for its server (upstream's script of this name).

Usage: `python scripts/convert_vqav2_for_submission.py --split llava_vqav2_mscoco_test-dev2015 --ckpt llava-v1.5-7b`.
Reads `<dir>/answers/<split>/<ckpt>/merge.jsonl`, writes `<dir>/answers_upload/<split>/<ckpt>.json`. The questions of
`<dir>/<split>.jsonl` must be answered, or all test questions where there is no such file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.scoring.matching import add_lenient
from llava.eval.scoring.submission import VQAV2_QUESTIONS, ids_of, vqav2
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program: upstream's, and the two folders of Dynamic-LLaVA's script."""
    parser = argparse.ArgumentParser(
        prog="python scripts/convert_vqav2_for_submission.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--dir", type=str, default="./playground/data/eval/vqav2", help="folder of the benchmark")
    parser.add_argument("--test_dir", type=str, default=None, help=f"folder of {VQAV2_QUESTIONS}; default: --dir")
    parser.add_argument("--result_dir", type=str, default=None, help="folder of answers and upload; default: --dir")
    parser.add_argument("--ckpt", type=str, required=True, help="name of the model's answers folder")
    parser.add_argument("--split", type=str, required=True, help="name of the question file without its ending")
    add_lenient(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    results, tests = Path(args.result_dir or args.dir), Path(args.test_dir or args.dir)
    split = tests / f"{args.split}.jsonl"
    vqav2(
        tests / VQAV2_QUESTIONS,
        results / "answers" / args.split / args.ckpt / "merge.jsonl",
        results / "answers_upload" / args.split / f"{args.ckpt}.json",
        ids_of(split) if split.is_file() else None,
        lenient=args.lenient,
    )


if __name__ == "__main__":
    run_program(main)
