r"""Let a language model compare answers to questions without an image (upstream `llava/eval/eval_gpt_review.py`).

OPENAI_API_KEY=... python -m llava.eval.eval_gpt_review --question question.jsonl --rule rule.json \
    --answer-list answer_vicuna-13b.jsonl answers.jsonl --output reviews.jsonl

A category without a rule of its own takes the rule `default`. The files are upstream's, from `llava/eval/table/`;
`llava.eval.model_qa` writes answers. The same command again asks for what is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.scoring.reviews import add_options, read_requests, refuse_inputs, write_reviews
from llava.runtime.program import run_program

MODEL = "gpt-4"
DEFAULT_RULE = "default"


def build_parser() -> argparse.ArgumentParser:
    """The original options and `--model`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_gpt_review",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, MODEL)
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program; returns the file of reviews.

    Raises:
        FlagError, BadSampleError: see `read_requests` and `write_reviews`.
    """
    args = build_parser().parse_args(argv)
    refuse_inputs(args)
    return write_reviews(args, read_requests(args, default=DEFAULT_RULE))


if __name__ == "__main__":
    run_program(main)
