r"""Let a language model compare answers on LLaVA-Bench (upstream `llava/eval/eval_gpt_review_bench.py`).

OPENAI_API_KEY=... python -m llava.eval.eval_gpt_review_bench --question questions.jsonl --context context.jsonl \
    --rule rule.json --answer-list answers_gpt4.jsonl answers/llava-v1.5-7b.jsonl --output reviews/llava-v1.5-7b.jsonl

The service is OpenAI's, or any with the same interface at OPENAI_BASE_URL. `rule.json` is upstream's
`llava/eval/table/rule.json`. A request that fails ends the program; the same command again asks for the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.eval.scoring.reviews import add_options, by_image, read_requests, refuse_inputs, write_reviews
from llava.runtime.program import run_program

MODEL = "gpt-4-0314"


def build_parser() -> argparse.ArgumentParser:
    """The original options and `--model`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_gpt_review_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, MODEL, context="context.jsonl of the benchmark: captions of the images")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program; returns the file of reviews.

    Raises:
        FlagError, BadSampleError: see `read_requests` and `write_reviews`.
    """
    args = build_parser().parse_args(argv)
    refuse_inputs(args)
    context_of = by_image(args.context, lambda row: "\n".join(row["caption"]))
    return write_reviews(args, read_requests(args, context_of, prefix="llava_bench_"))


if __name__ == "__main__":
    run_program(main)
