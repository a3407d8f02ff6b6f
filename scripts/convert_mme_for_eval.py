"""Answers on MME to the folder that MME's own tool and `llava.eval.eval_mme` read.

Usage: `python scripts/convert_mme_for_eval.py --data-dir MME_Benchmark_release_version --result-file answers.jsonl
--output-dir eval_tool/answers/llava-v1.5-7b`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.scoring.matching import add_lenient
from llava.eval.scoring.submission import mme
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python scripts/convert_mme_for_eval.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=str, required=True, help="MME_Benchmark_release_version")
    parser.add_argument("--result-file", type=str, required=True, help="answers file")
    parser.add_argument("--output-dir", type=str, required=True, help="folder to write <task>.txt into")
    add_lenient(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    mme(args.data_dir, args.result_file, args.output_dir, lenient=args.lenient)


if __name__ == "__main__":
    run_program(main)
